//! What ends a session, against what begins one at the same moment.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::jobs::tests::database;

const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

async fn service() -> Service {
    let store = database().await;
    let inner = Inner {
        signing: Signing::new(&[7; 32]),
        passwords: Passwords::new(4).await.unwrap(),
        backoff: Backoff::new(5, 20),
        life: TimeDelta::minutes(10),
        cache: Mutex::default(),
        store,
    };
    Service { inner: Arc::new(inner) }
}

impl Service {
    async fn with(&self, name: &str, password: &str) -> String {
        let hash = self.inner.passwords.hash(Secret::new(password)).await.unwrap();
        users::insert(&self.inner.store, name, hash.clone(), Role::Viewer).await.unwrap();
        hash
    }

    async fn sessions(&self) -> usize {
        self.inner.store.read(|db| async move { Ok(sessions::Entity::find().all(&db).await?.len()) }).await.unwrap()
    }
}

#[actix_web::test]
async fn a_password_that_changed_while_it_was_compared_opens_nothing() {
    let service = service().await;
    let (old, store) = (service.with("ann", "the old password").await, service.inner.store.clone());
    // Compared well, and then the password is reset before the session is stored.
    let new = service.inner.passwords.hash(Secret::new("the new password")).await.unwrap();
    users::update(&store, "ann", Some(new.clone()), None).await.unwrap();
    assert!(service.begin("ann", Ground::Password(old)).await.unwrap().is_none());
    assert_eq!(service.sessions().await, 0);
    // The other way round: the reset takes the session along.
    assert!(service.begin("ann", Ground::Password(new.clone())).await.unwrap().is_some());
    assert_eq!(service.sessions().await, 1);
    users::update(&store, "ann", Some(new.clone()), None).await.unwrap();
    assert_eq!(service.sessions().await, 0);
    // And a removal.
    assert!(service.begin("ann", Ground::Password(new.clone())).await.unwrap().is_some());
    users::insert(&store, "bob", new.clone(), Role::Admin).await.unwrap();
    users::delete(&store, "ann").await.unwrap();
    assert_eq!(service.sessions().await, 0);
    assert!(service.begin("ann", Ground::Password(new)).await.unwrap().is_none());
}

#[actix_web::test]
async fn a_session_that_was_ended_is_not_refreshed_and_a_good_one_once() {
    let service = service().await;
    service.with("ann", "a good password").await;
    let caller = service.login("ann", Secret::new("a good password"), ADDRESS).await.unwrap().caller;
    let fresh = service.refresh(&caller).await.unwrap().caller;
    assert_eq!(service.refresh(&caller).await.err().unwrap().code(), Code::Unauthorized);
    // A change of role ends it, and the next one has the new role.
    users::update(&service.inner.store, "ann", None, Some(Role::Operator)).await.unwrap();
    assert_eq!(service.refresh(&fresh).await.err().unwrap().code(), Code::Unauthorized);
    assert_eq!(service.sessions().await, 0);
    let again = service.login("ann", Secret::new("a good password"), ADDRESS).await.unwrap().caller;
    assert_eq!(again.role, Role::Operator);
}
