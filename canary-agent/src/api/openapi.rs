//! The description of the routes, made from the handlers and the bodies.

use std::{collections::BTreeMap, sync::OnceLock};

use bytes::Bytes;
use utoipa::{
    IntoResponses, OpenApi,
    openapi::{
        Ref, RefOr,
        content::ContentBuilder,
        response::{Response, ResponseBuilder},
    },
};

use super::{audience, events, model, routes};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "canary-agent",
        description = "The control socket of an agent of canary-xdp. The TCP listener \
                       (`agent.listen`) has the same routes for reading, but for `/v1/events`, audiences and clients, and the histories and plans of rollouts, and \
                       leaves out users and their reasons. Shares are fractions of 1. \
                       Every error is an `ErrorBody`."
    ),
    servers((url = "http://localhost", description = "The control socket; the host is ignored there.")),
    tags(
        (name = "reading", description = "Whoever can open the socket."),
        (name = "changing", description = "Root, the agent's own user, and `agent.operators`.")),
    paths(
        routes::status,
        routes::health,
        routes::service,
        routes::split,
        routes::set_split,
        routes::backends,
        routes::set_backend,
        routes::explain,
        routes::rollouts,
        routes::rollout_history,
        routes::rollout_plan,
        routes::rollout,
        audience::list,
        audience::show,
        audience::change_members,
        audience::client,
        events::events,
        routes::undo,
        routes::panic,
        routes::confirm,
        routes::freeze,
        routes::unfreeze,
        routes::reload,
        routes::description,
        routes::metrics,
    ),
    components(schemas(model::ErrorBody, model::ErrorDetail))
)]
struct Description;

/// The description as JSON.
pub(super) fn json() -> Bytes {
    static JSON: OnceLock<Bytes> = OnceLock::new();
    JSON.get_or_init(|| {
        let mut description = Description::openapi();
        description.info.version = env!("CARGO_PKG_VERSION").to_owned();
        description.to_json().unwrap_or_default().into()
    })
    .clone()
}

type Responses = BTreeMap<String, RefOr<Response>>;

/// Errors that every route may give.
const READING: [(&str, &str); 8] = [
    ("400", "The request is wrong: a query or path that is unknown, twice there or no text."),
    (
        "403",
        "TCP only: the listener does not serve that host (`bad_host`), or what is asked says who has done what (`socket_only`).",
    ),
    ("405", "The route does not know the method; `allow` lists those it knows."),
    ("408", "The request came too slowly (`slow_request`)."),
    ("409", "The agent refuses, for the reason given."),
    ("429", "The peer asks too often (`too_many_requests`)."),
    ("503", "Too many connections (`busy`), or the agent is stopping (`stopping`)."),
    ("504", "The agent did not answer in time (`timeout`)."),
];

/// Errors of a route about one service, besides those.
const SERVICE: [(&str, &str); 1] =
    [("404", "There is no such service (`unknown_service`), or audience (`unknown_audience`).")];

/// Errors of a change, besides those.
const CHANGE: [(&str, &str); 4] = [
    ("403", "The peer may not change anything (`not_permitted`), or asks over TCP (`read_only`)."),
    ("413", "The body is larger than 1 MiB (`body_too_large`)."),
    ("415", "The body is not declared as JSON (`not_json`)."),
    (
        "422",
        "The body names something that is not there, such as a version; or the configuration files are wrong (`bad_config`).",
    ),
];

fn errors<'a>(table: impl IntoIterator<Item = &'a (&'a str, &'a str)>) -> Responses {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name("ErrorBody"))).build();
    table
        .into_iter()
        .map(|(status, description)| {
            let response = ResponseBuilder::new()
                .description(*description)
                .content("application/json", body.clone())
                .build();
            ((*status).to_owned(), response.into())
        })
        .collect()
}

/// Errors of every route.
pub(super) struct ReadErrors;

impl IntoResponses for ReadErrors {
    fn responses() -> Responses {
        errors(&READING)
    }
}

/// Errors of the routes that read about one service.
pub(super) struct ServiceErrors;

impl IntoResponses for ServiceErrors {
    fn responses() -> Responses {
        errors(READING.iter().chain(&SERVICE))
    }
}

/// Errors of the routes that change something.
pub(super) struct ChangeErrors;

impl IntoResponses for ChangeErrors {
    fn responses() -> Responses {
        errors(READING.iter().chain(&SERVICE).chain(&CHANGE))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use axum::{Router, body::Body, extract::Request, routing::MethodRouter};
    use serde_json::Value;
    use tokio::sync::watch;
    use tower::ServiceExt;

    use super::*;
    use crate::{api::Api, config::model::Operators, daemon::Handle, telemetry::Metrics};

    fn description() -> Value {
        serde_json::from_slice(&json()).expect("JSON")
    }

    /// Whether a path of the router knows a method: it answers anything but 405.
    async fn knows(path: &str, methods: MethodRouter<Api>, method: &str) -> bool {
        let (handle, _) = Handle::channel(1);
        let (_, operators) = watch::channel(Operators::default());
        let router = Router::new().route(path, methods).with_state(Api::new(
            handle,
            operators,
            Metrics::new(),
        ));
        let request = Request::builder()
            .method(method)
            .uri(
                path.replace("{name}", "shop")
                    .replace("{address}", "192.0.2.1")
                    .replace("{backend}", "10.0.1.1:80")
                    .replace("{action}", "start"),
            )
            .body(Body::empty())
            .expect("a request");
        let response = router.oneshot(request).await.expect("an answer");
        assert_ne!(response.status(), 404, "{method} {path}");
        response.status() != 405
    }

    #[tokio::test]
    async fn every_route_is_described_and_nothing_else() {
        let description = description();
        let paths = description["paths"].as_object().expect("paths");
        let described: BTreeSet<(String, String)> = paths
            .iter()
            .flat_map(|(path, item)| {
                let methods = item.as_object().expect("methods").keys();
                methods.map(move |method| (method.to_uppercase(), path.clone()))
            })
            .collect();
        let mut routed = BTreeSet::new();
        for (path, methods) in routes::routes() {
            for method in ["GET", "PUT", "POST", "PATCH", "DELETE", "OPTIONS"] {
                if knows(path, methods.clone(), method).await {
                    routed.insert((method.to_owned(), path.to_owned()));
                }
            }
        }
        assert_eq!(described, routed);
    }

    #[test]
    fn every_answer_has_a_schema_that_is_there() {
        let description = description();
        let schemas = &description["components"]["schemas"];
        let mut references = Vec::new();
        collect(&description, &mut references);
        assert!(references.len() > 30, "{references:?}");
        for reference in references {
            let name = reference.strip_prefix("#/components/schemas/").expect("a schema");
            assert!(schemas.get(name).is_some(), "{name} is not described");
        }
        for item in description["paths"].as_object().expect("paths").values() {
            for operation in item.as_object().expect("methods").values() {
                let responses = operation["responses"].as_object().expect("responses");
                assert!(responses.contains_key("200"));
                for (status, response) in responses.iter().filter(|(status, _)| *status != "200") {
                    let schema = &response["content"]["application/json"]["schema"]["$ref"];
                    assert_eq!(schema, "#/components/schemas/ErrorBody", "{status}");
                }
            }
        }
    }

    fn collect(value: &Value, references: &mut Vec<String>) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    match value {
                        Value::String(text) if key == "$ref" => references.push(text.clone()),
                        value => collect(value, references),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, references)),
            _ => {}
        }
    }
}
