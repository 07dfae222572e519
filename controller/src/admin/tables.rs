//! The tables of a database as it describes them itself: so a new room's tables are in the backup without anybody's doing.
//!
//! Owns: names, columns, kinds of values, the order in which rows may be inserted. Never: changes anything. A crash here costs nothing.

use sea_orm::{ConnectionTrait, DbBackend, Statement, Value};
use serde_json::Value as Json;

use super::Error;

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text, and whatever is written as text.
    Text,
    /// Whole numbers.
    Integer,
    /// `true` or `false`; SQLite keeps 0 and 1.
    Boolean,
    /// Other numbers.
    Real,
    /// Bytes, written in hex.
    Bytes,
}

impl Kind {
    fn of(declared: &str) -> Self {
        let declared = declared.to_ascii_lowercase();
        let has = |word: &str| declared.contains(word);
        match () {
            () if has("bool") => Kind::Boolean,
            () if has("int") && !has("interval") && !has("point") => Kind::Integer,
            () if has("blob") || has("bytea") => Kind::Bytes,
            () if has("real") || has("double") || has("float") => Kind::Real,
            () => Kind::Text,
        }
    }

    /// A value out of a row of a backup.
    pub fn value(self, json: Json) -> Option<Value> {
        Some(match (self, json) {
            (Kind::Text, Json::Null) => Value::String(None),
            (Kind::Integer, Json::Null) => Value::BigInt(None),
            (Kind::Boolean, Json::Null) => Value::Bool(None),
            (Kind::Real, Json::Null) => Value::Double(None),
            (Kind::Bytes, Json::Null) => Value::Bytes(None),
            (Kind::Text, Json::String(text)) => text.into(),
            (Kind::Integer, Json::Number(number)) => number.as_i64()?.into(),
            (Kind::Boolean, Json::Bool(flag)) => flag.into(),
            (Kind::Boolean, Json::Number(number)) => (number.as_i64()? != 0).into(),
            (Kind::Real, Json::Number(number)) => number.as_f64()?.into(),
            (Kind::Bytes, Json::String(text)) => hex::decode(text).ok()?.into(),
            _ => return None,
        })
    }
}

/// A column.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: Kind,
}

/// A table.
#[derive(Clone, Debug)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Its columns.
    pub columns: Vec<Column>,
}

impl Table {
    /// The query that gives each row as a JSON array.
    pub fn rows(&self, backend: DbBackend) -> String {
        let is_postgres = backend == DbBackend::Postgres;
        let values = self.columns.iter().map(|column| {
            let name = quoted(&column.name);
            match (column.kind, is_postgres) {
                (Kind::Bytes, true) => format!("encode({name}, 'hex')"),
                (Kind::Bytes, false) => format!("hex({name})"),
                (Kind::Text, true) => format!("{name}::text"),
                _ => name,
            }
        });
        let values = values.collect::<Vec<_>>().join(", ");
        let name = quoted(&self.name);
        if is_postgres {
            format!("SELECT json_build_array({values})::text FROM {name}")
        } else {
            format!("SELECT json_array({values}) FROM {name} ORDER BY rowid")
        }
    }
}

/// A name as it stands in a statement.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

async fn strings(db: &impl ConnectionTrait, sql: &str, values: Vec<Value>) -> Result<Vec<Vec<String>>, Error> {
    let rows = db.query_all_raw(Statement::from_sql_and_values(db.get_database_backend(), sql, values)).await?;
    let mut all = Vec::with_capacity(rows.len());
    for row in rows {
        let columns = row.column_names().len();
        all.push((0..columns).map(|at| row.try_get_by_index::<String>(at)).collect::<Result<Vec<_>, _>>()?);
    }
    Ok(all)
}

/// Every table of ours, those first that others refer to. The list of migrations and what a database makes for itself are left out.
pub async fn all(db: &impl ConnectionTrait) -> Result<Vec<Table>, Error> {
    let is_postgres = db.get_database_backend() == DbBackend::Postgres;
    let names = match is_postgres {
        true => {
            "SELECT table_name::text FROM information_schema.tables \
             WHERE table_schema = current_schema() AND table_type = 'BASE TABLE' ORDER BY 1"
        }
        false => "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY 1",
    };
    let columns = match is_postgres {
        // A number that the database itself gives out and that is no key is its own affair.
        true => {
            "SELECT column_name::text, data_type::text FROM information_schema.columns c \
             WHERE table_schema = current_schema() AND table_name = $1 AND NOT (coalesce(column_default, '') LIKE 'nextval(%' \
             AND NOT EXISTS (SELECT 1 FROM information_schema.key_column_usage k WHERE k.table_schema = c.table_schema \
             AND k.table_name = c.table_name AND k.column_name = c.column_name)) ORDER BY ordinal_position"
        }
        false => "SELECT name, type FROM pragma_table_info(?1) ORDER BY cid",
    };
    let parents = match is_postgres {
        true => "SELECT confrelid::regclass::text FROM pg_constraint WHERE contype = 'f' AND conrelid = to_regclass(quote_ident($1))",
        false => "SELECT \"table\" FROM pragma_foreign_key_list(?1)",
    };
    let mut open = Vec::new();
    for name in strings(db, names, vec![]).await?.into_iter().flatten().filter(|name| !name.starts_with("seaql_")) {
        let columns = strings(db, columns, vec![name.clone().into()]).await?;
        let columns = columns.into_iter().filter_map(|column| {
            let [name, declared] = <[String; 2]>::try_from(column).ok()?;
            Some(Column { kind: Kind::of(&declared), name })
        });
        let table = Table { columns: columns.collect(), name: name.clone() };
        // A function takes a hundred values on Postgres.
        if table.columns.len() > 99 {
            return Err(Error::Refused(format!("table {name} has more than 99 columns")));
        }
        let parents: Vec<String> = strings(db, parents, vec![name.into()]).await?.into_iter().flatten().collect();
        open.push((table, parents));
    }
    let mut ordered: Vec<Table> = Vec::with_capacity(open.len());
    while !open.is_empty() {
        let before = open.len();
        open = open
            .into_iter()
            .filter_map(|(table, parents)| {
                let is_free = parents.iter().all(|parent| *parent == table.name || ordered.iter().any(|done| done.name == *parent));
                if is_free {
                    ordered.push(table);
                    None
                } else {
                    Some((table, parents))
                }
            })
            .collect();
        if open.len() == before {
            return Err(Error::Refused("tables refer to one another in a circle".to_owned()));
        }
    }
    Ok(ordered)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_as_what_they_were_and_nothing_else() {
        assert_eq!(Kind::Integer.value(serde_json::json!(i64::MIN)), Some(Value::from(i64::MIN)));
        assert_eq!(Kind::Boolean.value(serde_json::json!(1)), Some(Value::from(true)));
        assert_eq!(Kind::Bytes.value(serde_json::json!("00FF")), Some(Value::from(vec![0u8, 255])));
        assert_eq!(Kind::Text.value(Json::Null), Some(Value::String(None)));
        for (kind, bad) in
            [(Kind::Integer, serde_json::json!("1")), (Kind::Integer, serde_json::json!(1.5)), (Kind::Text, serde_json::json!(1))]
        {
            assert_eq!(kind.value(bad.clone()), None, "{kind:?} {bad}");
        }
        let kinds =
            ["bigint", "INTEGER", "character varying", "varchar", "boolean", "bytea", "double precision", "timestamp with time zone"];
        use Kind::*;
        assert_eq!(kinds.map(Kind::of), [Integer, Integer, Text, Text, Boolean, Bytes, Real, Text]);
    }
}
