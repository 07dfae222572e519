//! What ends a session, against what begins one at the same moment.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::access::password::cost_of;
use crate::jobs::tests::database;

const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

async fn service() -> Service {
    over(database().await, 4).await
}

async fn over(store: Store, cost: u32) -> Service {
    let inner = Inner {
        signing: Signing::new(&[7; 32]),
        passwords: Passwords::new(cost).await.unwrap(),
        backoff: Backoff::new(5, 20),
        life: TimeDelta::minutes(10),
        cache: Mutex::default(),
        store,
    };
    Service { inner: Arc::new(inner) }
}

impl Passwords {
    fn nobody(&self) -> Option<u32> {
        cost_of(&self.dummy())
    }
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

#[actix_web::test]
async fn a_new_cost_is_taken_over_with_a_log_in_and_nobody_costs_what_most_do() {
    let old = service().await;
    let (store, password) = (old.inner.store.clone(), || Secret::new("a good password"));
    for name in ["ann", "bob", "eve"] {
        old.with(name, "a good password").await;
    }
    let new = over(store.clone(), 5).await;
    let cost = async |name: &str| cost_of(&users::find(&store, name).await.unwrap().unwrap().password_hash);
    let session = new.login("ann", password(), ADDRESS).await.unwrap().caller;
    assert_eq!((cost("ann").await, cost("bob").await), (Some(5), Some(4)));
    assert_eq!(new.inner.passwords.nobody(), Some(4));
    assert!(new.is_alive(&session).await, "a new hash of the same password ended the session");
    new.login("bob", password(), ADDRESS).await.unwrap();
    assert_eq!(new.inner.passwords.nobody(), Some(5), "most users cost 5 by now");
    new.login("ann", password(), ADDRESS).await.unwrap();
    assert!(new.login("ann", Secret::new("a wrong password"), ADDRESS).await.is_err());
}
