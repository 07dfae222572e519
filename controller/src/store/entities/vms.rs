//! The inventory: VMs as their connection told them last.

use sea_orm::entity::prelude::*;

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "vms")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// Through which connection.
    #[sea_orm(primary_key, auto_increment = false)]
    pub connection: String,
    /// The provider's own id.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// Display name.
    pub name: String,
    /// Inventory path.
    pub path: String,
    /// The connection's kind.
    pub kind: String,
    /// `linux`, `windows`, `other`, `unknown`.
    pub os: String,
    /// `running`, `stopped`, `suspended`.
    pub status: String,
    /// Virtual CPUs.
    pub cpu: i64,
    /// Memory in MiB.
    pub memory_mb: i64,
    /// Folded name and id, for searching.
    pub search: String,
    /// The whole `shared::vm::Vm` as JSON.
    pub detail: String,
    /// When it was seen last.
    pub last_seen: i64,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
