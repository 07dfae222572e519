//! The OpenAPI document, collected from the handlers.
//!
//! Owns: the list of documented operations and what all of them share. Never: describes what is not built.

use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Deprecated, PathItem, Ref, RefOr, ResponseBuilder, path::Operation};
use utoipa::{Modify, OpenApi};

use super::reply::ErrorBody;
use crate::{access, alerts, carbon, files, fleet, jobs, live, providers, schedules, system, uploads, vms, webhooks};

/// The document.
#[derive(OpenApi)]
#[openapi(
    info(title = "HyperSDK", description = "Exports VMs, proves that what arrived is what left. Every operation answers at /api/v1/X and at /X."),
    servers((url = "/api/v1"), (url = "/")),
    modifiers(&Common),
    components(schemas(ErrorBody)),
    paths(
        access::routes::login, access::routes::logout, access::routes::refresh, access::routes::me,
        access::routes::user_list, access::routes::user_create, access::routes::user_update, access::routes::user_delete,
        access::api_tokens::routes::list, access::api_tokens::routes::create, access::api_tokens::routes::revoke,
        jobs::routes::create, jobs::routes::list, jobs::routes::get, jobs::routes::cancel, jobs::routes::logs,
        jobs::routes::retry, jobs::routes::pause, jobs::routes::cutover, jobs::routes::resume, jobs::routes::stats, jobs::routes::batch,
        jobs::legacy::submit, jobs::legacy::query, jobs::legacy::cancel, jobs::legacy::progress, jobs::legacy::status,
        vms::routes::list, vms::routes::browse, vms::routes::get, vms::power::switch, vms::deploy::deploy, vms::console::routes::open,
        vms::snapshots::list, vms::snapshots::take, vms::snapshots::remove,
        providers::routes::list, providers::connect::connect, providers::routes::capabilities, providers::routes::get,
        providers::routes::remove, providers::routes::test, providers::routes::refresh,
        fleet::routes::list, fleet::routes::get, fleet::routes::remove, fleet::routes::drain, fleet::routes::resume,
        fleet::routes::token_create,
        system::routes::health, system::routes::livez, system::routes::readyz, system::routes::metrics, system::routes::audit_list,
        system::state::health, system::state::readiness, alerts::routes::list, providers::change::change, vms::compare::routes::compare,
        webhooks::routes::list, webhooks::routes::create, webhooks::routes::remove, webhooks::routes::test,
        live::routes::open, live::routes::ticket,
        schedules::routes::list, schedules::routes::create, schedules::routes::get, schedules::routes::update, schedules::routes::remove,
        schedules::routes::run, schedules::routes::runs,
        carbon::routes::intensity, carbon::routes::schedule,
        uploads::routes::init, uploads::routes::chunk, uploads::routes::complete, uploads::routes::status, uploads::routes::remove,
        files::routes::browse, files::routes::download, files::routes::manifest, files::routes::export_remove,
    )
)]
pub struct Document;

/// What every operation shares: the bearer token's scheme and the answers that any of them may give.
struct Common;

impl Modify for Common {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT or API token (hsdk_…)").build();
        if let Some(components) = document.components.as_mut() {
            components.add_security_scheme("token", SecurityScheme::Http(bearer));
        }
        for item in document.paths.paths.values_mut() {
            for operation in operations(item) {
                if operation.tags.as_ref().is_some_and(|tags| tags.iter().any(|tag| tag == "Legacy")) {
                    operation.deprecated = Some(Deprecated::True);
                }
                add(operation, "429", "too many requests; see Retry-After");
                add(operation, "500", "our defect; the log has the cause under the request_id");
                add(operation, "503", "the database is away; see Retry-After");
            }
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let all = [&mut item.get, &mut item.post, &mut item.patch, &mut item.put, &mut item.delete];
    all.into_iter().filter_map(Option::as_mut)
}

fn add(operation: &mut Operation, status: &str, description: &str) {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Error"))).build();
    let response = ResponseBuilder::new().description(description).content("application/json", content).build();
    operation.responses.responses.entry(status.to_owned()).or_insert(RefOr::T(response));
}
