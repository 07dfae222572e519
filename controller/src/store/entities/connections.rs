//! Connections to providers, each served by one agent.

use sea_orm::entity::prelude::*;

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "connections")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// Its name, unique.
    #[sea_orm(primary_key, auto_increment = false)]
    pub name: String,
    /// `local`, `vsphere`, later `libvirt`.
    pub kind: String,
    /// The agent that serves it.
    pub agent_id: String,
    /// For `local`: the folder on the agent's host; for `vsphere`: HOST[:PORT].
    pub path: String,
    /// `agent`: configured on the agent; `rest`: connected by a person.
    pub origin: String,
    /// `connected`, `away` or `error`.
    pub status: String,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
    /// When its inventory came last.
    pub last_seen: Option<i64>,
    /// When it was made.
    pub created_at: i64,
    /// When it was changed last.
    pub updated_at: i64,
    /// What may be shown of its account, as JSON: see [`crate::providers::account::Settings`].
    pub settings: Option<String>,
    /// The account's password, sealed.
    pub secret: Option<String>,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
