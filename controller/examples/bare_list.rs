//! What `GET /jobs` is measured against: a bare actix-web handler that asks the database the same by sea-orm, over the same TLS.
//!
//! Owns: nothing. Never: part of the product. `DATABASE_URL`, `LISTEN`, `TLS_CERT` and `TLS_KEY` say where; `QUERY` is `status`, `search`
//! or anything else for the plain list. Each answer is a page of 50 rows, newest first, and the count of all that match.

use std::path::Path;
use std::time::Duration;

use actix_web::{App, HttpServer, web};
use controller::store::entities::jobs;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sea_orm::{
    ColumnTrait, ConnectOptions, Database, DatabaseConnection, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect,
};

struct Bare {
    db: DatabaseConnection,
    runtime: tokio::runtime::Handle,
    query: String,
}

async fn list(bare: web::Data<Bare>) -> Result<web::Json<serde_json::Value>, actix_web::Error> {
    let mut find = jobs::Entity::find();
    match bare.query.as_str() {
        "status" => find = find.filter(jobs::Column::Status.eq("completed")),
        "provider" => find = find.filter(jobs::Column::ProviderKind.eq("vsphere")).filter(jobs::Column::Status.eq("failed")),
        "search" => find = find.filter(jobs::Column::VmFolded.contains("vm-004242")),
        _ => {}
    }
    let db = bare.db.clone();
    let work = async move {
        let total = find.clone().count(&db).await?;
        let rows = find.order_by_desc(jobs::Column::CreatedAt).order_by_desc(jobs::Column::Id).limit(50).into_json().all(&db).await?;
        Ok::<_, sea_orm::DbErr>(serde_json::json!({"data": rows, "pagination": {"total": total}}))
    };
    let answer = bare.runtime.spawn(work).await.map_err(actix_web::error::ErrorInternalServerError)?;
    Ok(web::Json(answer.map_err(actix_web::error::ErrorInternalServerError)?))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let variable = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut options = ConnectOptions::new(variable("DATABASE_URL")?);
    let most = if variable("DATABASE_URL")?.starts_with("sqlite") { 5 } else { 16 };
    options.sqlx_logging(false).max_connections(most).acquire_timeout(Duration::from_secs(3));
    let db = runtime.block_on(Database::connect(options))?;
    let file = |name: &str| variable(name).and_then(|path| shared::vault::read_config(Path::new(&path)).map_err(|e| e.to_string()));
    let chain = CertificateDer::pem_slice_iter(&file("TLS_CERT")?).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(&file("TLS_KEY")?)?;
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let tls = tls.with_no_client_auth().with_single_cert(chain, key)?;
    let bare = web::Data::new(Bare { db, runtime: runtime.handle().clone(), query: variable("QUERY").unwrap_or_default() });
    let server = HttpServer::new(move || App::new().app_data(bare.clone()).route("/jobs", web::get().to(list)));
    actix_web::rt::System::new().block_on(server.bind_rustls_0_23(variable("LISTEN")?, tls)?.run())?;
    Ok(())
}
