//! The routes: what can be asked, and who answers.
//!
//! Handlers turn a request into a question to the loop and its answer into JSON.
//! They decide nothing themselves. Must not know of connections.

use std::collections::BTreeMap;

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::{MethodRouter, get, post, put},
};
use bytes::Bytes;

use super::{
    Api, audience,
    error::{ApiError, exit},
    events::events,
    extract::{
        Anonymous, BackendName, Body, NoQuery, Operator, Query, RolloutAction, RolloutName,
        ServiceName, read_only,
    },
    host,
    model::{
        BackendReport, BackendRequest, Backends, ChangeReport, ConfirmReport, ConfirmRequest,
        Explain, FreezeReport, FreezeRequest, Health, ServiceStatus, Split, SplitRequest, Status,
        UndoReport, UndoRequest, VersionShare, VersionStatus,
    },
    openapi::{self, ChangeErrors, ReadErrors, ServiceErrors},
    panic::{PanicReport, PanicRequest},
    plan::{self, Instead},
    public,
    reload::{ReloadReport, ReloadRequest},
    rollout::{RolloutHistory, RolloutReport, RolloutRequest, RolloutStatus, Rollouts},
};
use crate::{
    daemon::{Action, ExplainQuery, Refusal},
    rollout::outlook::Outlook,
    telemetry::Exposition,
};

/// The route that may take longer than others.
pub(super) const RELOAD: &str = "/v1/reload";

/// Everything that can be asked: paths, parameters in braces, and their methods.
pub(super) fn routes() -> [(&'static str, MethodRouter<Api>); 24] {
    [
        ("/v1/status", get(status)),
        ("/v1/health", get(health)),
        ("/v1/services/{name}", get(service)),
        ("/v1/services/{name}/split", get(split).put(set_split)),
        ("/v1/services/{name}/backends", get(backends)),
        ("/v1/services/{name}/backends/{backend}", put(set_backend)),
        ("/v1/services/{name}/explain", get(explain)),
        ("/v1/rollouts", get(rollouts)),
        ("/v1/rollouts/{name}/history", get(rollout_history)),
        ("/v1/rollouts/{name}/plan", get(rollout_plan)),
        ("/v1/rollouts/{name}/{action}", post(rollout)),
        ("/v1/audiences", get(audience::list)),
        ("/v1/audiences/{name}", get(audience::show)),
        ("/v1/audiences/{name}/members", post(audience::change_members)),
        ("/v1/clients/{address}", get(audience::client)),
        ("/v1/events", get(events)),
        ("/v1/undo", post(undo)),
        ("/v1/panic", post(panic)),
        ("/v1/confirm", post(confirm)),
        ("/v1/freeze", post(freeze)),
        ("/v1/unfreeze", post(unfreeze)),
        (RELOAD, post(reload)),
        ("/v1/openapi.json", get(description)),
        ("/metrics", get(metrics)),
    ]
}

/// The routes of the control socket.
pub(super) fn control(api: Api) -> Router {
    routes()
        .into_iter()
        .fold(Router::new(), |router, (path, methods)| router.route(path, methods))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::map_response(headers))
        .with_state(api)
}

/// The same, without whatever changes things and for known hosts only, and the
/// page for people.
pub(super) fn read_only_routes(api: Api) -> Router {
    let guard = middleware::from_fn_with_state(api.clone(), guard);
    Router::new()
        .route("/", get(dashboard))
        .fallback_service(control(api))
        .layer(guard)
        .layer(middleware::map_response(headers))
}

async fn guard(State(api): State<Api>, request: Request, next: Next) -> Response {
    if !host::permitted(request.uri(), request.headers(), &api.host_name) {
        return ApiError::new(
            StatusCode::FORBIDDEN,
            "bad_host",
            exit::USAGE,
            "the request was meant for another host than this agent",
        )
        .help("use the agent's IP address, `localhost` or its host name in the URL")
        .into_response();
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return read_only().into_response();
    }
    let path = request.uri().path();
    if let Some(why) = public::socket_only(path) {
        return ApiError::new(
            StatusCode::FORBIDDEN,
            "socket_only",
            exit::NOT_PERMITTED,
            format!("{path} {why}, and is not answered over TCP"),
        )
        .help("ask on the control socket, as `canary-agent` does")
        .into_response();
    }
    next.run(request).await
}

/// Headers of every answer: nothing is to be kept or guessed at.
async fn headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "unknown_route",
        exit::USAGE,
        format!("there is no route {}", uri.path()),
    )
    .help("the routes are described by /v1/openapi.json")
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        exit::USAGE,
        format!("{method} is not possible on {}", uri.path()),
    )
    .help("the header `allow` lists what is")
}

/// The whole status.
#[utoipa::path(get, path = "/v1/status", tag = "reading",
    responses((status = 200, description = "Everything the agent knows.", body = Status), ReadErrors))]
async fn status(
    State(api): State<Api>,
    Anonymous(anonymous): Anonymous,
    _: NoQuery,
) -> Result<Response, ApiError> {
    let snapshot = api.snapshot().await?;
    Ok(json(if anonymous { snapshot.public_json() } else { snapshot.json() }))
}

/// Whether the agent's loop answers: liveness.
#[utoipa::path(get, path = "/v1/health", tag = "reading",
    responses((status = 200, description = "The loop answers.", body = Health), ReadErrors))]
async fn health(State(api): State<Api>, _: NoQuery) -> Result<Json<Health>, ApiError> {
    let snapshot = api.snapshot().await?;
    let agent = &snapshot.status.agent;
    Ok(Json(Health {
        status: "ok".to_owned(),
        version: agent.version.clone(),
        uptime_seconds: agent.uptime_seconds,
    }))
}

/// One service.
#[utoipa::path(get, path = "/v1/services/{name}", tag = "reading",
    params(("name" = String, Path, description = "The service.")),
    responses((status = 200, description = "The service.", body = ServiceStatus), ServiceErrors))]
async fn service(
    State(api): State<Api>,
    ServiceName(name): ServiceName,
    Anonymous(anonymous): Anonymous,
    _: NoQuery,
) -> Result<Json<ServiceStatus>, ApiError> {
    let snapshot = api.snapshot().await?;
    let status = if anonymous { snapshot.public() } else { &snapshot.status };
    Ok(Json(find(status, &name)?.clone()))
}

/// A service's split.
#[utoipa::path(get, path = "/v1/services/{name}/split", tag = "reading",
    params(("name" = String, Path, description = "The service.")),
    responses((status = 200, description = "The split.", body = Split), ServiceErrors))]
async fn split(
    State(api): State<Api>,
    ServiceName(name): ServiceName,
    _: NoQuery,
) -> Result<Json<Split>, ApiError> {
    let snapshot = api.snapshot().await?;
    let service = find(&snapshot.status, &name)?;
    let versions = service.versions.iter().map(|version| {
        let VersionStatus {
            name,
            asked,
            asked_text,
            in_force,
            buckets,
            connections: _,
            measured,
            signals: _,
            backends: _,
        } = version.clone();
        VersionShare { name, asked, asked_text, in_force, buckets, measured }
    });
    Ok(Json(Split {
        service: service.name.clone(),
        control: service.control.clone(),
        revision: snapshot.status.agent.revision,
        buckets: service.buckets,
        versions: versions.collect(),
    }))
}

/// Sets the shares of some or all versions of a service, or says what that would do.
///
/// Needs root, the agent's own uid, or a uid or gid of `agent.operators`; not
/// possible over TCP.
#[utoipa::path(put, path = "/v1/services/{name}/split", tag = "changing",
    params(("name" = String, Path, description = "The service.")),
    request_body = SplitRequest,
    responses(
        (status = 200, description = "What has moved, or would move.", body = ChangeReport),
        ChangeErrors))]
async fn set_split(
    State(api): State<Api>,
    ServiceName(service): ServiceName,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<SplitRequest>,
) -> Result<Json<ChangeReport>, ApiError> {
    Ok(Json(api.handle.split(service, request, peer).await?))
}

/// A service's backends: their health, weight, buckets, state, and open connections as far
/// as they are known.
#[utoipa::path(get, path = "/v1/services/{name}/backends", tag = "reading",
    params(("name" = String, Path, description = "The service.")),
    responses((status = 200, description = "The backends.", body = Backends), ServiceErrors))]
async fn backends(
    State(api): State<Api>,
    ServiceName(service): ServiceName,
    _: NoQuery,
) -> Result<Json<Backends>, ApiError> {
    Ok(Json(api.handle.backends(service).await?))
}

/// Tells a backend to be ready, to drain or to take nothing, or says what that would do.
///
/// Needs what a change of the split needs.
#[utoipa::path(put, path = "/v1/services/{name}/backends/{backend}", tag = "changing",
    params(
        ("name" = String, Path, description = "The service."),
        ("backend" = String, Path,
            description = "`ADDRESS:PORT`, or `ADDRESS` where the service has one backend there.")),
    request_body = BackendRequest,
    responses(
        (status = 200, description = "What has moved, or would move.", body = BackendReport),
        ChangeErrors))]
async fn set_backend(
    State(api): State<Api>,
    ServiceName(service): ServiceName,
    BackendName(backend): BackendName,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<BackendRequest>,
) -> Result<Json<BackendReport>, ApiError> {
    Ok(Json(api.handle.backend(service, backend, request, peer).await?))
}

/// Takes the last change back, or all changes since a revision; or says what that would do.
///
/// Needs what a change of the split needs.
#[utoipa::path(post, path = "/v1/undo", tag = "changing",
    request_body = UndoRequest,
    responses(
        (status = 200, description = "What is, or would be, taken back.", body = UndoReport),
        ChangeErrors))]
async fn undo(
    State(api): State<Api>,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<UndoRequest>,
) -> Result<Json<UndoReport>, ApiError> {
    let mut report = api.handle.undo(request, peer).await?;
    api.users.name(&mut report.undone).await;
    Ok(Json(report))
}

/// All rollouts: how they stand, or how the last one of each name ended.
#[utoipa::path(get, path = "/v1/rollouts", tag = "reading",
    responses((status = 200, description = "The rollouts.", body = Rollouts), ReadErrors))]
async fn rollouts(
    State(api): State<Api>,
    Anonymous(anonymous): Anonymous,
    _: NoQuery,
) -> Result<Json<Rollouts>, ApiError> {
    let snapshot = api.snapshot().await?;
    let status = if anonymous { snapshot.public() } else { &snapshot.status };
    Ok(Json(Rollouts { rollouts: status.rollouts.clone() }))
}

/// The runs of a rollout, the newest first.
///
/// Not answered over TCP: reasons are about people.
#[utoipa::path(get, path = "/v1/rollouts/{name}/history", tag = "reading",
    params(
        ("name" = String, Path, description = "The rollout."),
        ("evidence" = Option<bool>, Query, description = "With all that they went by.")),
    responses((status = 200, description = "The runs.", body = RolloutHistory), ServiceErrors))]
async fn rollout_history(
    State(api): State<Api>,
    RolloutName(name): RolloutName,
    mut query: Query,
) -> Result<Json<RolloutHistory>, ApiError> {
    let evidence = match query.take("evidence").as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            let message = format!("`evidence` should be `true` or `false`, not `{other}`");
            return Err(ApiError::bad_request("bad_query", message));
        }
    };
    query.finish(&["evidence"])?;
    Ok(Json(api.handle.rollout_history(name, evidence).await?))
}

/// How small a fault each gate of a rollout would find, with what chance and in what time, at
/// the present rate of connections or another one.
///
/// It takes up to seconds, and one is made at a time. Not answered over TCP.
#[utoipa::path(get, path = "/v1/rollouts/{name}/plan", tag = "reading",
    params(
        ("name" = String, Path, description = "The rollout."),
        ("rate" = Option<f64>, Query,
            description = "New connections of the service a second; as counted when left out."),
        ("usual" = Option<String>, Query,
            description = "How often signals are usual, as `connect_failed=0.2%,short_flow=1%`; as known when left out.")),
    responses((status = 200, description = "What is to be expected.", body = Outlook), ServiceErrors))]
async fn rollout_plan(
    State(api): State<Api>,
    RolloutName(name): RolloutName,
    query: Query,
) -> Result<Json<Outlook>, ApiError> {
    Ok(Json(plan::plan(&api, name, Instead::read(query)?).await?))
}

/// Tells a rollout to `start`, `pause`, `resume`, `promote`, `abort` or `retry`, or says what
/// that would do.
///
/// `abort` is not refused by a freeze, nor by a change that waits for its confirmation, nor
/// where it can't be stored. Needs what a change of the split needs.
#[utoipa::path(post, path = "/v1/rollouts/{name}/{action}", tag = "changing",
    params(
        ("name" = String, Path, description = "The rollout."),
        ("action" = String, Path, description = "What it is told.")),
    request_body = RolloutRequest,
    responses(
        (status = 200, description = "How it stands.", body = RolloutReport),
        ChangeErrors))]
async fn rollout(
    State(api): State<Api>,
    RolloutName(name): RolloutName,
    RolloutAction(action): RolloutAction,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<RolloutRequest>,
) -> Result<Json<RolloutReport>, ApiError> {
    let dry_run = request.dry_run;
    let mut report = api.handle.rollout(name.clone(), action, request, peer).await?;
    if let (true, None, Some(share)) = (dry_run, &report.audience, &report.share) {
        let RolloutStatus { service, to, .. } = &report.rollout;
        let split = BTreeMap::from([(to.clone(), share.clone())]);
        let request = SplitRequest { split, dry_run, ..SplitRequest::default() };
        // What a freeze is in the way of is no reason to say nothing.
        report.change = api.handle.split(service.clone(), request, peer).await.ok();
    }
    // It has begun already, or would: what follows delays nothing but the answer.
    if matches!(action, Action::Start | Action::Retry) {
        report.warnings = plan::warnings(&api, &name).await;
    }
    Ok(Json(report))
}

/// Sends everything of a service, or of all, to control at once; or says what that would do.
///
/// Not refused by a freeze, nor by a change that waits for its confirmation. Needs what a change
/// of the split needs.
#[utoipa::path(post, path = "/v1/panic", tag = "changing",
    request_body = PanicRequest,
    responses(
        (status = 200, description = "What has moved, or would move.", body = PanicReport),
        ChangeErrors))]
async fn panic(
    State(api): State<Api>,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<PanicRequest>,
) -> Result<Json<PanicReport>, ApiError> {
    Ok(Json(api.handle.panic(request, peer).await?))
}

/// Keeps a change that was made with `confirm`.
///
/// Needs what a change of the split needs.
#[utoipa::path(post, path = "/v1/confirm", tag = "changing",
    request_body = ConfirmRequest,
    responses(
        (status = 200, description = "What stays, or would.", body = ConfirmReport),
        ChangeErrors))]
async fn confirm(
    State(api): State<Api>,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<ConfirmRequest>,
) -> Result<Json<ConfirmReport>, ApiError> {
    let mut report = api.handle.confirm(request, peer).await?;
    api.users.name(&mut report.confirmed).await;
    Ok(Json(report))
}

/// From now on, a service or all of them may only be changed towards control.
///
/// Needs what a change of the split needs.
#[utoipa::path(post, path = "/v1/freeze", tag = "changing",
    request_body = FreezeRequest,
    responses(
        (status = 200, description = "What is, or would be, frozen.", body = FreezeReport),
        ChangeErrors))]
async fn freeze(
    State(api): State<Api>,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<FreezeRequest>,
) -> Result<Json<FreezeReport>, ApiError> {
    Ok(Json(api.handle.freeze(request, true, peer).await?))
}

/// Ends a freeze.
///
/// Needs what a change of the split needs.
#[utoipa::path(post, path = "/v1/unfreeze", tag = "changing",
    request_body = FreezeRequest,
    responses(
        (status = 200, description = "What is, or would be, changed again.", body = FreezeReport),
        ChangeErrors))]
async fn unfreeze(
    State(api): State<Api>,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<FreezeRequest>,
) -> Result<Json<FreezeReport>, ApiError> {
    Ok(Json(api.handle.freeze(request, false, peer).await?))
}

/// Where a client's connections go, and why.
#[utoipa::path(get, path = "/v1/services/{name}/explain", tag = "reading",
    params(
        ("name" = String, Path, description = "The service."),
        ("from" = String, Query, description = "The client, `ADDRESS` or `ADDRESS:PORT`."),
        ("to" = Option<String>, Query,
            description = "`ADDRESS:PORT` of the service; its first of the client's family when left out."),
        ("protocol" = Option<String>, Query,
            description = "`tcp` or `udp`; that of the service's first port when left out.")),
    responses((status = 200, description = "The decision.", body = Explain), ServiceErrors))]
async fn explain(
    State(api): State<Api>,
    ServiceName(service): ServiceName,
    mut query: Query,
) -> Result<Json<Explain>, ApiError> {
    let from = query.take("from");
    let (to, protocol) = (query.take("to"), query.take("protocol"));
    query.finish(&["from", "to", "protocol"])?;
    let from = from.ok_or_else(|| {
        ApiError::bad_request("bad_query", "the query has no key `from`")
            .help("say which client: `?from=192.0.2.7` or `?from=192.0.2.7:40000`")
    })?;
    let query = ExplainQuery { from, to, protocol };
    Ok(Json(api.handle.explain(service, query).await?))
}

/// Goes on with what the configuration files say by now, or says what that would change.
///
/// All of it or nothing. Needs what a change of the split needs, also with `dry_run`: the
/// answer shows lines of the files.
#[utoipa::path(post, path = "/v1/reload", tag = "changing",
    request_body = ReloadRequest,
    responses(
        (status = 200, description = "What has changed, or would change.", body = ReloadReport),
        ChangeErrors))]
async fn reload(
    State(api): State<Api>,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<ReloadRequest>,
) -> Result<Json<ReloadReport>, ApiError> {
    Ok(Json(api.handle.reload(request, Some(peer)).await?))
}

/// This description.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "reading",
    responses((status = 200, description = "OpenAPI 3.1.", body = Object), ReadErrors))]
async fn description(_: NoQuery) -> Response {
    json(openapi::json())
}

/// Metrics for Prometheus, in its text format or, where the client accepts it, in OpenMetrics.
#[utoipa::path(get, path = "/metrics", tag = "reading",
    responses(
        (status = 200, description = "Metrics.", body = String, content_type = "text/plain"),
        ReadErrors))]
async fn metrics(State(api): State<Api>, headers: HeaderMap) -> Result<Response, ApiError> {
    let format = Exposition::for_accept(
        headers.get_all(header::ACCEPT).iter().filter_map(|accept| accept.to_str().ok()),
    );
    let text = api.snapshot().await?.metrics(&api.metrics, format);
    Ok(([(header::CONTENT_TYPE, format.content_type())], text).into_response())
}

/// The page for people. It loads nothing from elsewhere, and may not.
async fn dashboard() -> Response {
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                  connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let page = Html(include_str!("dashboard.html"));
    ([(header::CONTENT_SECURITY_POLICY, policy)], page).into_response()
}

fn json(body: Bytes) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// The service of that name.
fn find<'a>(status: &'a Status, name: &str) -> Result<&'a ServiceStatus, ApiError> {
    let services = &status.services;
    if let Some(service) = services.iter().find(|service| service.name == name) {
        return Ok(service);
    }
    let nearest = services
        .iter()
        .map(|service| (strsim::jaro_winkler(&service.name, name), &service.name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.8);
    Err(Refusal {
        code: "unknown_service",
        message: format!("there is no service `{name}`"),
        help: Some(match nearest {
            Some((_, nearest)) => format!("did you mean `{nearest}`?"),
            None => "`canary-agent status` lists the services".to_owned(),
        }),
        exit_code: exit::FAILED,
    }
    .into())
}
