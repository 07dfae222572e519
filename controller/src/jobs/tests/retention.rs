//! Finished jobs whose files are to go.

use super::*;

#[actix_web::test]
async fn what_lies_at_an_agent_that_is_away_hides_nothing() {
    let bench = Bench::new().await;
    let rows: Vec<store::NewRow> = (0..1003)
        .map(|n| {
            let mut job = Job::new(shared::ids::JobId::generate().to_string(), bench.new_job());
            job.state.status = Status::Completed;
            // The two youngest lie at an agent that is here.
            job.state.agent = Some(if n < 1001 { "agent-away" } else { "agent-a" }.to_owned());
            // Ten share each millisecond.
            job.finished_at = Some(n / 10);
            job.result = Some(serde_json::json!({"files": []}));
            store::NewRow { job, answer: None, lines: vec![] }
        })
        .collect();
    store::insert_all(&bench.store, &rows).await.unwrap();
    let find = async |agents: &[&str], behind| {
        let agents = agents.iter().map(|agent| (*agent).to_owned()).collect();
        store::with_files(&bench.store, &[JobType::Export], agents, 1000, behind, "removed_at").await.unwrap()
    };
    assert_eq!(find(&["agent-a"], None).await.len(), 2);
    assert!(find(&[], None).await.is_empty());
    // One page behind the other, each job once.
    let mut seen = std::collections::BTreeSet::new();
    let mut behind = None;
    for page in [1000, 3, 0] {
        let jobs = find(&["agent-a", "agent-away"], behind.clone()).await;
        assert_eq!(jobs.len(), page);
        behind = jobs.last().map(|job| (job.finished_at.unwrap(), job.id.clone()));
        seen.extend(jobs.into_iter().map(|job| job.id));
    }
    assert_eq!(seen.len(), 1003);
}
