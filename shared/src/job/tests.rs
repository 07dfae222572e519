//! Every state that four assignments can reach, and what must hold of each.
#![allow(clippy::unwrap_used)]

use std::collections::{HashSet, VecDeque};

use super::*;

fn events(state: &State) -> Vec<Event> {
    let mut events = vec![Event::Cancel, Event::Retry, Event::Pause, Event::Resume, Event::AgentHere(true), Event::AgentHere(false)];
    events.push(Event::Release);
    events.extend([Hold::None, Hold::NotBefore, Hold::Carbon, Hold::Paused, Hold::Agent].map(Event::Hold));
    for agent in ["a", "b"] {
        events.push(Event::Assign { agent: agent.into() });
        for epoch in [state.epoch.saturating_sub(1), state.epoch] {
            let agent = agent.to_owned();
            events.push(Event::CommitRequested { epoch, agent: agent.clone() });
            for stage in [Stage::Copying, Stage::Verifying, Stage::Deploying, Stage::Publishing] {
                events.push(Event::Staged { epoch, agent: agent.clone(), stage });
            }
            for outcome in [
                Outcome::Completed,
                Outcome::Failed { retryable: true },
                Outcome::Failed { retryable: false },
                Outcome::Cancelled,
                Outcome::Parked,
            ] {
                events.push(Event::Finished { epoch, agent: agent.clone(), outcome, bytes: 0 });
            }
        }
    }
    events.extend([state.epoch.saturating_sub(1), state.epoch].map(|epoch| Event::LeaseLost { epoch, bytes: 0 }));
    events
}

/// Every state reachable within four assignments, from every event, twice each: invariants hold, old epochs change nothing,
/// a completed job was granted, nothing moves out of completed.
#[test]
fn every_reachable_state_keeps_the_invariants() {
    let (mut seen, mut todo) = (HashSet::new(), VecDeque::from([State::queued()]));
    while let Some(state) = todo.pop_front() {
        if state.epoch > 4 || !seen.insert(state.clone()) {
            continue;
        }
        invariant(&state).unwrap();
        for event in events(&state) {
            let Ok((next, effects)) = step(&state, &event) else { continue };
            assert!(next.epoch >= state.epoch, "{state:?} {event:?}");
            if state.status == Status::Completed {
                assert_eq!(next, state, "{event:?} moved a completed job");
            }
            if next.status == Status::Completed && state.status != Status::Completed {
                assert!(state.is_publishing());
            }
            if let Event::Finished { epoch, agent, .. } | Event::CommitRequested { epoch, agent } | Event::Staged { epoch, agent, .. } =
                &event
            {
                assert!(*epoch == state.epoch && state.agent.as_ref() == Some(agent), "{state:?} took {event:?} of another assignment");
            }
            if state.is_granted() && next.is_granted() {
                assert_eq!(state.agent, next.agent, "{event:?} gave a granted job to another agent");
            }
            if matches!(event, Event::Assign { .. }) {
                assert_eq!(state.hold, Hold::None, "{event:?} took a job that is held");
            }
            if state.hold == Hold::Paused && next.status == Status::Queued && next.hold != Hold::Paused {
                assert_eq!(event, Event::Resume, "only a person ends a person's pause");
            }
            if state.status == Status::Running && next.hold != Hold::None {
                assert!(matches!(event, Event::Pause | Event::Hold(Hold::Carbon)) && effects.contains(&Effect::SendPark), "{event:?}");
            }
            if effects.contains(&Effect::GrantCommit) {
                assert!(next.is_publishing());
            }
            todo.push_back(next);
        }
    }
    assert!(seen.len() > 300, "only {} states", seen.len());
}

#[test]
fn five_attempts_that_bring_nothing_fail_a_job_and_progress_forgives_them() {
    let mut state = State::queued();
    for round in 1..=STRIKES {
        state = step(&state, &Event::Assign { agent: "a".into() }).unwrap().0;
        state = step(&state, &Event::LeaseLost { epoch: state.epoch, bytes: 0 }).unwrap().0;
        assert_eq!(state.status == Status::Failed, round == STRIKES);
    }
    state = step(&state, &Event::Retry).unwrap().0;
    for round in 1..=20 {
        state = step(&state, &Event::Assign { agent: "a".into() }).unwrap().0;
        state = step(&state, &Event::LeaseLost { epoch: state.epoch, bytes: round }).unwrap().0;
        assert_eq!(state.status, Status::Queued);
    }
}

#[test]
fn what_is_granted_can_not_be_cancelled_and_only_its_agent_completes_it() {
    let mut state = step(&State::queued(), &Event::Assign { agent: "a".into() }).unwrap().0;
    state = step(&state, &Event::CommitRequested { epoch: 1, agent: "a".into() }).unwrap().0;
    assert!(step(&state, &Event::Cancel).is_err());
    assert!(step(&state, &Event::Finished { epoch: 1, agent: "b".into(), outcome: Outcome::Completed, bytes: 9 }).is_err());
    let (done, _) = step(&state, &Event::Finished { epoch: 1, agent: "a".into(), outcome: Outcome::Completed, bytes: 9 }).unwrap();
    assert_eq!(done.status, Status::Completed);
    let again = step(&done, &Event::Finished { epoch: 1, agent: "a".into(), outcome: Outcome::Completed, bytes: 9 }).unwrap();
    assert_eq!(again, (done, vec![Effect::Acknowledge]));
}

#[test]
fn a_hold_is_released_by_the_clock_or_by_a_person_and_parks_what_runs() {
    let after = |state: &State, event: Event| step(state, &event).unwrap().0;
    let held = after(&State::queued(), Event::Hold(Hold::NotBefore));
    assert_eq!(held.public_stage(), "not_before");
    assert!(step(&held, &Event::Assign { agent: "a".into() }).is_err());
    // Whether its agent is here says nothing while its time has not come.
    assert_eq!(after(&held, Event::AgentHere(false)), held);
    assert_eq!(after(&held, Event::Release).hold, Hold::None);
    assert_eq!(after(&held, Event::Resume).hold, Hold::None);
    assert_eq!(after(&held, Event::Cancel).status, Status::Cancelled);
    let paused = after(&held, Event::Pause);
    assert_eq!(after(&after(&paused, Event::Release), Event::Hold(Hold::Carbon)), paused);
    let running = after(&State::queued(), Event::Assign { agent: "a".into() });
    assert!(step(&running, &Event::Hold(Hold::NotBefore)).is_err());
    let (parked, effects) = step(&running, &Event::Hold(Hold::Carbon)).unwrap();
    assert_eq!((parked.public_stage(), parked.strikes), ("carbon", 0));
    assert!(effects.contains(&Effect::SendPark));
    let granted = after(&running, Event::CommitRequested { epoch: 1, agent: "a".into() });
    assert!(step(&granted, &Event::Hold(Hold::Carbon)).is_err());
}
