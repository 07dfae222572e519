//! Alerts over a real SQLite: what is stored, and what webhooks are to be told.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::alerts::rules::{Rule, Severity};
use crate::jobs::tests::database;
use crate::store::entities::{webhook_deliveries as deliveries, webhooks as hooks};

#[actix_web::test]
async fn an_alert_that_gets_critical_twice_is_told_twice() {
    let store = database().await;
    let hook = hooks::Model {
        id: "hook-1".into(),
        url: "https://hooks.example/".into(),
        events: r#"["alert"]"#.into(),
        secret: String::new(),
        created_by: "ann".into(),
        created_at: 0,
        last_at: None,
        last_status: None,
        last_ms: None,
        last_error: None,
    };
    webhooks::store::insert(&store, hook, None).await.unwrap();
    let finding = |severity| Finding { key: Key::new(Rule::DiskLow, "controller data"), severity, message: "full".into() };
    let raised = row(&finding(Severity::Critical), 1000);
    apply(&store, vec![Change::Raise(finding(Severity::Critical))], vec![raised.clone()], 1000).await.unwrap();
    for (now, severity, told) in
        [(2000, Severity::Warning, 1), (3000, Severity::Critical, 1), (3001, Severity::Critical, 0), (4000, Severity::Warning, 1)]
    {
        let change = Change::Restate(raised.id.clone(), finding(severity));
        assert_eq!(apply(&store, vec![change], vec![], now).await.unwrap().len(), told, "at {now}");
    }
    let all = store.read(|db| async move { Ok(deliveries::Entity::find().order_by_asc(deliveries::Column::Id).all(&db).await?) });
    let said: Vec<bool> = all.await.unwrap().iter().map(|delivery| delivery.body.contains(r#""severity":"critical""#)).collect();
    assert_eq!(said, [true, false, true, false]);
}
