//! HTTP: the whole route table on one page, and the layers around it.
//!
//! ```text
//! TLS ▸ outer (id, identity, shape of errors) ▸ log ▸ limit anonymous ▸ limit users ▸ table ▸ handler
//! ```
//! Owns: which path and method leads where; every operation at `/api/v1/X` and at `/X`. Never: does anything itself.
//! A crash here costs one answer: a panic in a handler is caught by [`outer`].

pub mod body;
pub mod docs;
pub mod guard;
pub mod idempotency;
pub mod limits;
pub mod openapi;
pub mod outer;
pub mod pace;
pub mod query;
pub mod reply;
mod span;
pub mod tls;
mod unread;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests;

use actix_governor::Governor;
use actix_web::body::BoxBody;
use actix_web::dev::{ServiceFactory, ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::middleware::from_fn;
use actix_web::{App, FromRequest, Handler, HttpRequest, Responder, Route, web};
use shared::error::Code;
use tracing_actix_web::TracingLogger;

use crate::app::App as Shared;
use crate::{access, alerts, carbon, files, fleet, jobs, live, providers, schedules, system, uploads, vms, webhooks};
use reply::Error;

/// Milliseconds since 1970 as the API writes time.
pub fn rfc3339(milliseconds: i64) -> String {
    shared::clock::rfc3339(chrono::DateTime::from_timestamp_millis(milliseconds).unwrap_or_default())
}

/// Every operation.
fn table(at: &mut dyn FnMut(&str, Vec<Operation>)) {
    at("/auth/login", vec![post(access::routes::login)]);
    at("/auth/logout", vec![post(access::routes::logout)]);
    at("/auth/refresh", vec![post(access::routes::refresh)]);
    at("/auth/me", vec![get(access::routes::me)]);
    at("/auth/tokens", vec![get(access::api_tokens::routes::list), post(access::api_tokens::routes::create)]);
    at("/auth/tokens/{id}", vec![delete(access::api_tokens::routes::revoke)]);
    at("/users", vec![get(access::routes::user_list), post(access::routes::user_create)]);
    at("/users/{name}", vec![patch(access::routes::user_update), delete(access::routes::user_delete)]);

    at("/jobs", vec![get(jobs::routes::list), post(jobs::routes::create)]);
    at("/jobs/batch", vec![post(jobs::routes::batch)]);
    at("/jobs/submit", vec![post(jobs::legacy::submit)]);
    at("/jobs/query", vec![post(jobs::legacy::query)]);
    at("/jobs/cancel", vec![post(jobs::legacy::cancel)]);
    at("/jobs/progress/{id}", vec![get(jobs::legacy::progress)]);
    at("/status", vec![get(jobs::legacy::status)]);
    at("/jobs/stats", vec![get(jobs::routes::stats)]);
    at("/jobs/{id}", vec![get(jobs::routes::get), delete(jobs::routes::cancel)]);
    at("/jobs/{id}/logs", vec![get(jobs::routes::logs)]);
    at("/jobs/{id}/manifest", vec![get(files::routes::manifest)]);
    at("/jobs/{id}/retry", vec![post(jobs::routes::retry)]);
    at("/jobs/{id}/pause", vec![post(jobs::routes::pause)]);
    at("/jobs/{id}/cutover", vec![post(jobs::routes::cutover)]);
    at("/jobs/{id}/resume", vec![post(jobs::routes::resume)]);
    at("/exports/{id}", vec![delete(files::routes::export_remove)]);

    at("/vms/list", vec![get(vms::routes::list)]);
    at("/vms/browse", vec![post(vms::routes::browse)]);
    at("/vms/compare", vec![post(vms::compare::routes::compare)]);
    at("/vms/deploy", vec![post(vms::deploy::deploy)]);
    at("/vms/{provider}/{id}", vec![get(vms::routes::get)]);
    at("/vms/{provider}/{id}/power", vec![post(vms::power::switch)]);
    at("/vms/{provider}/{id}/console", vec![get(vms::console::routes::open)]);
    at("/vms/{provider}/{id}/snapshots", vec![get(vms::snapshots::list), post(vms::snapshots::take)]);
    at("/vms/{provider}/{id}/snapshots/{snapshot}", vec![delete(vms::snapshots::remove)]);

    at("/providers", vec![get(providers::routes::list)]);
    at("/providers/connect", vec![post(providers::connect::connect)]);
    at("/providers/capabilities", vec![get(providers::routes::capabilities)]);
    at("/providers/{name}", vec![get(providers::routes::get), patch(providers::change::change), delete(providers::routes::remove)]);
    at("/providers/{name}/test", vec![post(providers::routes::test)]);
    at("/providers/{name}/refresh", vec![post(providers::routes::refresh)]);

    at("/agents", vec![get(fleet::routes::list)]);
    at("/agents/tokens", vec![post(fleet::routes::token_create)]);
    at("/agents/{id}", vec![get(fleet::routes::get), delete(fleet::routes::remove)]);
    at("/agents/{id}/drain", vec![post(fleet::routes::drain)]);
    at("/agents/{id}/resume", vec![post(fleet::routes::resume)]);

    at("/health", vec![get(system::routes::health)]);
    at("/livez", vec![get(system::routes::livez)]);
    at("/readyz", vec![get(system::routes::readyz)]);
    at("/metrics", vec![get(system::routes::metrics)]);
    at("/audit", vec![get(system::routes::audit_list)]);
    at("/system/health", vec![get(system::state::health)]);
    at("/system/alerts", vec![get(alerts::routes::list)]);
    at("/readiness", vec![get(system::state::readiness)]);
    at("/webhooks", vec![get(webhooks::routes::list), post(webhooks::routes::create)]);
    at("/webhooks/{id}", vec![delete(webhooks::routes::remove)]);
    at("/webhooks/{id}/test", vec![post(webhooks::routes::test)]);

    at("/upload/init", vec![post(uploads::routes::init)]);
    at("/upload/chunk", vec![post(uploads::routes::chunk)]);
    at("/upload/complete", vec![post(uploads::routes::complete)]);
    at("/upload/status/{id}", vec![get(uploads::routes::status)]);
    at("/upload/{id}", vec![delete(uploads::routes::remove)]);
    at("/download", vec![get(files::routes::download)]);
    at("/browse/files", vec![get(files::routes::browse)]);

    at("/schedules", vec![get(schedules::routes::list), post(schedules::routes::create)]);
    at("/schedules/{id}", vec![get(schedules::routes::get), patch(schedules::routes::update), delete(schedules::routes::remove)]);
    at("/schedules/{id}/run", vec![post(schedules::routes::run)]);
    at("/schedules/{id}/runs", vec![get(schedules::routes::runs)]);
    at("/carbon/intensity", vec![get(carbon::routes::intensity)]);
    at("/carbon/schedule", vec![get(carbon::routes::schedule)]);

    at("/ws", vec![get(live::routes::open)]);
    at("/ws/ticket", vec![post(live::routes::ticket)]);
    at("/openapi.json", vec![get(docs::openapi)]);
    at("/docs", vec![get(docs::redirect)]);
    at("/docs/{file:.*}", vec![get(docs::page)]);
}

/// A method and its handler.
type Operation = (Method, Route);

fn operation<F, A>(method: Method, handler: F) -> Operation
where
    F: Handler<A>,
    A: FromRequest + 'static,
    F::Output: Responder + 'static,
{
    let route = match method {
        // Whoever may GET may ask for the head alone.
        Method::GET => web::route().guard(actix_web::guard::Any(actix_web::guard::Get()).or(actix_web::guard::Head())),
        ref method => web::method(method.clone()),
    };
    (method, route.to(handler))
}

macro_rules! methods {
    ($($name:ident = $method:ident),*) => {
        $(fn $name<F, A>(handler: F) -> Operation
        where
            F: Handler<A>,
            A: FromRequest + 'static,
            F::Output: Responder + 'static,
        {
            operation(Method::$method, handler)
        })*
    };
}
methods!(get = GET, post = POST, patch = PATCH, delete = DELETE);

/// Registers the table under both prefixes.
pub fn register(config: &mut web::ServiceConfig) {
    for prefix in ["/api/v1", ""] {
        table(&mut |path, operations| {
            let mut allow = Vec::new();
            let mut resource = web::resource(format!("{prefix}{path}"));
            for (method, route) in operations {
                allow.push(method.to_string());
                if method == Method::GET {
                    allow.push(Method::HEAD.to_string());
                }
                resource = resource.route(route);
            }
            let allow = allow.join(", ");
            config.service(resource.default_service(web::to(move |request: HttpRequest| {
                let error = wrong_method(&request, &allow);
                async move { Err::<&'static str, Error>(error) }
            })));
        });
    }
    config.default_service(web::to(unknown_path));
}

fn wrong_method(request: &HttpRequest, allow: &str) -> Error {
    let message = format!("{} is not a method of this path; it takes {allow}", clip(request.method().as_str()));
    Error::new(Code::MethodNotAllowed, message).header("Allow", allow.to_owned())
}

async fn unknown_path(request: HttpRequest) -> Result<&'static str, Error> {
    Err(Error::not_found(format!("no operation at `{}`; GET /openapi.json lists them", clip(request.path()))))
}

fn clip(text: &str) -> String {
    text.chars().take(120).collect()
}

/// The application as every worker runs it.
pub fn application(
    shared: web::Data<Shared>,
    anonymous: &limits::Anonymous,
    users: &limits::Users,
) -> App<
    impl ServiceFactory<ServiceRequest, Config = (), Response = ServiceResponse<BoxBody>, Error = actix_web::Error, InitError = ()> + use<>,
> {
    // The second limiter sits on a scope of everything: the limiters want a future that can be moved, and `App::wrap` hides that it can.
    App::new()
        .app_data(shared)
        .wrap(Governor::new(anonymous))
        .wrap(TracingLogger::<span::Requests>::new())
        .wrap(from_fn(outer::outer))
        .service(web::scope("").wrap(Governor::new(users)).configure(register))
}
