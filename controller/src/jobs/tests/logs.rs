//! A job's log: followed to its end, gone on with behind a line, let go of by a drain.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;

#[actix_web::test]
async fn a_log_is_followed_to_the_end_and_goes_on_after_a_line() {
    use futures_util::StreamExt;
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let id = bench.submit(50).await.id;
    let follow = bench.core.follow(&id).await.unwrap();
    let stream = crate::jobs::logs::stream(bench.store.clone(), id.clone(), crate::jobs::logs::Form::Lines, 0, Some(follow));
    let reader =
        actix_web::rt::spawn(
            async move { stream.map(|chunk| String::from_utf8(chunk.unwrap().to_vec()).unwrap()).collect::<String>().await },
        );
    for n in 0..600 {
        let log = wire::Log {
            job: id.clone(),
            epoch: 1,
            level: "info".into(),
            stage: "copying".into(),
            message: format!("line {n}"),
            ..Default::default()
        };
        bench.core.report("agent-a".into(), Report::Log(log)).await;
        if n % 100 == 0 {
            bench.core.flush_logs().await;
        }
    }
    bench.commit(&id, 1).await;
    bench.finish(&id, 1, Outcome::Completed("{}".into())).await;
    bench.core.flush_logs().await;
    let text = tokio::time::timeout(Duration::from_secs(10), reader).await.expect("the stream ends with the job").unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|line| line["seq"].as_i64().unwrap()).collect::<Vec<_>>(), (1..=604).collect::<Vec<_>>());
    assert_eq!((lines[603]["message"].as_str(), lines[10]["level"].as_str()), (Some("completed"), Some("info")));
    // An event stream that begins after the end ends at once, after what the reader has not seen.
    let follow = bench.core.follow(&id).await.unwrap();
    let rest: Vec<_> =
        crate::jobs::logs::stream(bench.store.clone(), id, crate::jobs::logs::Form::Events, 603, Some(follow)).collect().await;
    let rest: String = rest.into_iter().map(|chunk| String::from_utf8(chunk.unwrap().to_vec()).unwrap()).collect();
    assert!(rest.starts_with("id: 604\nevent: log\ndata: {") && rest.ends_with("event: end\ndata: {}\n\n"), "{rest}");
}

#[actix_web::test]
async fn a_drain_lets_the_followers_of_a_log_go_without_saying_that_it_ended() {
    use futures_util::StreamExt;
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let id = bench.submit(50).await.id;
    let mut readers = Vec::new();
    for late in [false, true] {
        if late {
            bench.core.drain().await;
        }
        let follow = bench.core.follow(&id).await.unwrap();
        let stream = crate::jobs::logs::stream(bench.store.clone(), id.clone(), crate::jobs::logs::Form::Events, 0, Some(follow));
        readers.push(actix_web::rt::spawn(stream.map(|chunk| String::from_utf8(chunk.unwrap().to_vec()).unwrap()).collect::<String>()));
    }
    for reader in readers {
        let text = tokio::time::timeout(Duration::from_secs(10), reader).await.expect("a followed log ends with the drain").unwrap();
        assert!(text.contains("attempt 1 begins") && !text.contains("event: end"), "{text}");
    }
}
