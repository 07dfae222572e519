//! Rows of agents and join tokens.
//!
//! Owns: every query on `join_tokens` and all on `agents` but the measured rates. A token is used up by a compare-and-set.
//! Never: holds a token's secret, only its SHA-256. A crash here costs nothing: each call is one transaction.

use proto::v1::{Hello, Root};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, Condition, EntityTrait, QueryFilter, QueryOrder, TransactionTrait};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::store::entities::{agents, join_tokens};
use crate::store::{Error, Store};

/// A folder with a name on an agent's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = AgentRoot)]
pub struct RootRow {
    /// Its name in paths.
    pub name: String,
    /// Where it lies on the agent's host.
    pub path: String,
    /// Free bytes when it was last said.
    pub free_bytes: u64,
    /// Size of its file system.
    pub total_bytes: u64,
    /// Whether jobs may write into it.
    pub writable: bool,
}

impl From<&Root> for RootRow {
    fn from(root: &Root) -> Self {
        Self {
            name: root.name.clone(),
            path: root.path.clone(),
            free_bytes: root.free_bytes,
            total_bytes: root.total_bytes,
            writable: root.writable,
        }
    }
}

/// The roots of an agent's row; none where it never said Hello.
pub fn roots(agent: &agents::Model) -> Vec<RootRow> {
    serde_json::from_str(&agent.roots).unwrap_or_default()
}

/// Agents that were not removed, by name.
pub async fn all(store: &Store) -> Result<Vec<agents::Model>, Error> {
    let find = agents::Entity::find().filter(agents::Column::Revoked.eq(false)).order_by_asc(agents::Column::Name);
    store.read(move |db| async move { Ok(find.all(&db).await?) }).await
}

/// An agent by id, removed ones included.
pub async fn by_id(store: &Store, id: &str) -> Result<Option<agents::Model>, Error> {
    let find = agents::Entity::find_by_id(id);
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// An agent that was not removed, by id or name.
pub async fn by_id_or_name(store: &Store, id: &str) -> Result<Option<agents::Model>, Error> {
    if id.contains('\0') {
        return Ok(None);
    }
    let which = Condition::any().add(agents::Column::Id.eq(id)).add(agents::Column::Name.eq(id));
    let find = agents::Entity::find().filter(which).filter(agents::Column::Revoked.eq(false));
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// Keeps what an agent says of itself.
pub async fn hello(store: &Store, id: &str, hello: &Hello) -> Result<(), Error> {
    let json = |value: serde_json::Result<String>| value.map_err(|e| Error::Other(e.to_string()));
    let roots: Vec<RootRow> = hello.roots.iter().map(Into::into).collect();
    let changes = agents::ActiveModel {
        version: Set(hello.version.clone()),
        instance: Set(hello.instance.clone()),
        hostname: Set(hello.hostname.clone()),
        cpus: Set(i64::from(hello.cpus)),
        roots: Set(json(serde_json::to_string(&roots))?),
        formats: Set(json(serde_json::to_string(&hello.formats))?),
        last_seen: Set(Some(shared::clock::now().timestamp_millis())),
        ..Default::default()
    };
    let update = agents::Entity::update_many().set(changes).filter(agents::Column::Id.eq(id));
    store.run(move |db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}

/// Notes that an agent was heard now.
pub async fn seen(store: &Store, id: &str) -> Result<(), Error> {
    let now = shared::clock::now().timestamp_millis();
    let update = agents::Entity::update_many().col_expr(agents::Column::LastSeen, Expr::value(Some(now))).filter(agents::Column::Id.eq(id));
    store.run(move |db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}

/// Whether an agent gets new work.
pub async fn set_draining(store: &Store, id: &str, draining: bool) -> Result<(), Error> {
    let update = agents::Entity::update_many().col_expr(agents::Column::Draining, Expr::value(draining)).filter(agents::Column::Id.eq(id));
    store.run(move |db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}

/// Removes an agent: its key is worth nothing from now on, its name is free again.
pub async fn revoke(store: &Store, agent: &agents::Model) -> Result<(), Error> {
    let id = agent.id.clone();
    let gone = format!("{} (removed, {})", agent.name, agent.id);
    let update = agents::Entity::update_many()
        .col_expr(agents::Column::Revoked, Expr::value(true))
        .col_expr(agents::Column::Name, Expr::value(gone))
        .filter(agents::Column::Id.eq(id));
    store.run(move |db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}

/// Keeps a new token's hash; what ran out a day ago goes.
pub async fn add_token(store: &Store, token: join_tokens::Model) -> Result<(), Error> {
    let old = token.created_at - 24 * 3600 * 1000;
    let row = join_tokens::ActiveModel {
        hash: Set(token.hash),
        name: Set(token.name),
        created_by: Set(token.created_by),
        created_at: Set(token.created_at),
        expires_at: Set(token.expires_at),
        used_at: Set(token.used_at),
    };
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            join_tokens::Entity::delete_many().filter(join_tokens::Column::ExpiresAt.lt(old)).exec(&transaction).await?;
            join_tokens::Entity::insert(row).exec_without_returning(&transaction).await?;
            Ok(transaction.commit().await?)
        })
        .await
}

/// A token by its hash.
pub async fn token(store: &Store, hash: &str) -> Result<Option<join_tokens::Model>, Error> {
    let find = join_tokens::Entity::find_by_id(hash);
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// Who joins.
#[derive(Clone, Debug)]
pub struct Joiner {
    /// Name that people will use.
    pub name: String,
    /// SHA-256 of its key.
    pub key_sha256: String,
    /// Key that signs its manifests, hex.
    pub signing_key: String,
}

/// What became of an attempt to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Joined {
    /// A new agent, or a known one with a new key.
    As(String),
    /// The token was not there to be used, or somebody was quicker.
    TokenGone,
    /// Another agent bears that name.
    NameTaken,
}

/// Uses a token up and enters the agent, both or neither. A token made for this very name gives a known agent its new key.
pub async fn join(store: &Store, hash: &str, joiner: Joiner) -> Result<Joined, Error> {
    let hash = hash.to_owned();
    let now = shared::clock::now().timestamp_millis();
    let new_id = format!("agent-{}", shared::ids::random_hex::<8>());
    let work = move |db: sea_orm::DatabaseConnection| async move {
        let transaction = db.begin().await?;
        let take = join_tokens::Entity::update_many()
            .col_expr(join_tokens::Column::UsedAt, Expr::value(Some(now)))
            .filter(join_tokens::Column::Hash.eq(&hash))
            .filter(join_tokens::Column::UsedAt.is_null())
            .filter(join_tokens::Column::ExpiresAt.gt(now));
        if take.exec(&transaction).await?.rows_affected != 1 {
            return Ok(Joined::TokenGone);
        }
        let token = join_tokens::Entity::find_by_id(&hash).one(&transaction).await?;
        let is_for_it = token.is_some_and(|token| token.name.as_deref() == Some(joiner.name.as_str()));
        let known = agents::Entity::find().filter(agents::Column::Name.eq(&joiner.name)).one(&transaction).await?;
        let id = match known {
            Some(_) if !is_for_it => return Ok(Joined::NameTaken),
            Some(known) => {
                let changes =
                    agents::ActiveModel { key_sha256: Set(joiner.key_sha256), signing_key: Set(joiner.signing_key), ..Default::default() };
                agents::Entity::update_many().set(changes).filter(agents::Column::Id.eq(&known.id)).exec(&transaction).await?;
                known.id
            }
            None => {
                agents::Entity::insert(new_row(&new_id, joiner, now)).exec_without_returning(&transaction).await?;
                new_id
            }
        };
        transaction.commit().await?;
        Ok(Joined::As(id))
    };
    store.run(work).await
}

fn new_row(id: &str, joiner: Joiner, now: i64) -> agents::ActiveModel {
    agents::ActiveModel {
        id: Set(id.to_owned()),
        name: Set(joiner.name),
        key_sha256: Set(joiner.key_sha256),
        signing_key: Set(joiner.signing_key),
        version: Set(String::new()),
        instance: Set(String::new()),
        hostname: Set(String::new()),
        cpus: Set(0),
        roots: Set("[]".to_owned()),
        formats: Set("[]".to_owned()),
        rates: Set("{}".to_owned()),
        revoked: Set(false),
        draining: Set(false),
        enrolled_at: Set(now),
        last_seen: Set(None),
    }
}
