//! Deliveries over a real SQLite.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::jobs::tests::database;

#[actix_web::test]
async fn what_a_restart_would_note_again_is_not_forgotten() {
    const DAY: i64 = 24 * 3600 * 1000;
    let store = database().await;
    let hook = webhooks::Model {
        id: "hook-1".into(),
        url: "https://hooks.example/".into(),
        events: r#"["job.completed"]"#.into(),
        secret: String::new(),
        created_by: "ann".into(),
        created_at: 0,
        last_at: None,
        last_status: None,
        last_ms: None,
        last_error: None,
    };
    insert(&store, hook, None).await.unwrap();
    let ended = |key: &str, time| Ended { kind: "job.completed", key: key.to_owned(), time, data: json!({}) };
    let all = || vec![ended("old", 1000), ended("last", DAY)];
    note_ended(&store, all(), DAY).await.unwrap();
    let done = deliveries::ActiveModel { state: Set("delivered".to_owned()), finished_at: Set(Some(DAY)), ..Default::default() };
    let done = deliveries::Entity::update_many().set(done);
    store.run(|db| async move { Ok(done.exec(&db).await.map(drop)?) }).await.unwrap();
    // Quiet days later, after a restart: the last job is within the overlap of the first look, the old one is not.
    forget_old(&store, 9 * DAY).await.unwrap();
    note_ended(&store, vec![ended("last", DAY)], DAY).await.unwrap();
    assert_eq!(pending(&store).await.unwrap(), 0);
    let left = store.read(|db| async move { Ok(deliveries::Entity::find().all(&db).await?) }).await.unwrap();
    assert_eq!(left.iter().map(|row| row.event_key.as_str()).collect::<Vec<_>>(), ["last"]);
}
