//! What a request carries, taken out with errors that say what is wrong.
//!
//! axum's own extractors answer in plain text; these answer in JSON, refuse what
//! they do not know, and bound what they read.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    extract::{FromRequest, FromRequestParts, RawPathParams, Request},
    http::{StatusCode, header, request::Parts},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{
    Api,
    error::{ApiError, exit},
    server::{Closing, Origin},
};
use crate::daemon::{Action, Peer};

/// The largest body that is read.
const BODY_BYTES: usize = 1024 * 1024;

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Api> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, api: &Api) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        if let Some(kind) = parts.headers.get(header::CONTENT_TYPE)
            && !is_json(kind.as_bytes())
        {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "not_json",
                exit::USAGE,
                "the body is not declared as JSON",
            )
            .help("send the header `content-type: application/json`"));
        }
        let declared = parts
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if declared.is_some_and(|length| length > BODY_BYTES) {
            return Err(too_large());
        }
        let bytes = timeout(api.limits.body, Limited::new(body, BODY_BYTES).collect())
            .await
            .map_err(|_| slow_body(api.limits.body))?
            .map_err(|error| {
                if error.is::<LengthLimitError>() || caused_by_length(&*error) {
                    too_large()
                } else {
                    ApiError::bad_request("bad_body", format!("the body can't be read: {error}"))
                }
            })?
            .to_bytes();
        // A list would be read too, as fields in their order: none at all, for an empty one.
        let is_list = bytes.trim_ascii_start().first() == Some(&b'[');
        if is_list && serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_ok() {
            return Err(ApiError::bad_request("bad_body", "the body is a list, and no object")
                .help("the fields are described by /v1/openapi.json"));
        }
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            if error.is_data() {
                ApiError::bad_request("bad_body", format!("the body does not fit: {error}"))
                    .help("the fields are described by /v1/openapi.json")
            } else {
                ApiError::bad_request(
                    "malformed_json",
                    format!("the body is not well-formed JSON: {error}"),
                )
            }
        })
    }
}

fn is_json(kind: &[u8]) -> bool {
    let essence = kind.split(|byte| *byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

fn caused_by_length(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(error.source(), |error| error.source())
        .any(|error| error.is::<LengthLimitError>())
}

fn too_large() -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body_too_large",
        exit::USAGE,
        format!("the body is larger than {BODY_BYTES} bytes"),
    )
}

fn slow_body(limit: Duration) -> ApiError {
    ApiError::new(
        StatusCode::REQUEST_TIMEOUT,
        "slow_request",
        exit::FAILED,
        format!("the request's body took more than {limit:?}"),
    )
}

/// The keys of the query. Each may be given once.
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    /// Takes a key's value.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    /// Ends the reading: keys that nobody took are unknown.
    ///
    /// # Errors
    /// `unknown_parameter`, with the nearest of `known`.
    pub(super) fn finish(self, known: &[&str]) -> Result<(), ApiError> {
        let Some(key) = self.0.keys().next() else {
            return Ok(());
        };
        let error = ApiError::bad_request(
            "unknown_parameter",
            format!("the query has an unknown key `{key}`"),
        );
        Err(match known {
            [] => error.help("this route takes none"),
            known => error.help(format!("known keys: {}", known.join(", "))),
        })
    }
}

impl FromRequestParts<Api> for Query {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        let bad = |reason: String| ApiError::bad_request("bad_query", reason);
        let pairs = axum::extract::Query::<Vec<(String, String)>>::from_request_parts(parts, api)
            .await
            .map_err(|rejection| bad(rejection.body_text()))?;
        let mut keys = BTreeMap::new();
        for (key, value) in pairs.0 {
            if keys.contains_key(&key) {
                return Err(bad(format!("the query has the key `{key}` twice")));
            }
            keys.insert(key, value);
        }
        Ok(Self(keys))
    }
}

/// For routes that take no query.
pub(super) struct NoQuery;

impl FromRequestParts<Api> for NoQuery {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        Query::from_request_parts(parts, api).await?.finish(&[])?;
        Ok(Self)
    }
}

/// The `{name}` of the path: a service.
pub(super) struct ServiceName(pub(super) String);

impl FromRequestParts<Api> for ServiceName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        path_part(parts, api, "name").await.map(Self)
    }
}

/// The `{backend}` of the path.
pub(super) struct BackendName(pub(super) String);

impl FromRequestParts<Api> for BackendName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        path_part(parts, api, "backend").await.map(Self)
    }
}

/// The `{name}` of the path: a rollout.
pub(super) struct RolloutName(pub(super) String);

impl FromRequestParts<Api> for RolloutName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        path_part(parts, api, "name").await.map(Self)
    }
}

/// The `{name}` of the path: an audience.
pub(super) struct AudienceName(pub(super) String);

impl FromRequestParts<Api> for AudienceName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        path_part(parts, api, "name").await.map(Self)
    }
}

/// The `{address}` of the path: a client.
pub(super) struct ClientAddress(pub(super) std::net::IpAddr);

impl FromRequestParts<Api> for ClientAddress {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        let text = path_part(parts, api, "address").await?;
        text.parse().map(Self).map_err(|_| {
            ApiError::bad_request("bad_address", format!("`{text}` is no address"))
                .help("write `192.0.2.1` or `2001:db8::1`")
        })
    }
}

/// The `{action}` of the path: what a rollout is told.
pub(super) struct RolloutAction(pub(super) Action);

impl FromRequestParts<Api> for RolloutAction {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        let word = path_part(parts, api, "action").await?;
        let action = Action::ALL.into_iter().find(|action| action.name() == word);
        action.map(Self).ok_or_else(|| {
            ApiError::bad_request("bad_path", format!("a rollout can't be told to `{word}`"))
                .help(format!("it is told to {}", Action::ALL.map(Action::name).join(", ")))
        })
    }
}

async fn path_part(parts: &mut Parts, api: &Api, part: &str) -> Result<String, ApiError> {
    let params = RawPathParams::from_request_parts(parts, api)
        .await
        .map_err(|rejection| ApiError::bad_request("bad_path", rejection.body_text()))?;
    let found = params.iter().find(|(key, _)| *key == part);
    match found {
        Some((_, text)) => Ok(text.to_owned()),
        None => Err(ApiError::bad_request("bad_path", format!("the path has no {part}"))),
    }
}

/// Tells an answer that goes on when the listener ends.
pub(super) struct EndOfService(Option<Closing>);

impl EndOfService {
    /// Waits until it does; where nobody listens, for ever.
    pub(super) async fn ended(&mut self) {
        match &mut self.0 {
            Some(closing) => closing.ended().await,
            None => std::future::pending().await,
        }
    }
}

impl FromRequestParts<Api> for EndOfService {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Self::Rejection> {
        Ok(Self(parts.extensions.get::<Closing>().cloned()))
    }
}

/// Whether nobody knows who asks: over TCP.
pub(super) struct Anonymous(pub(super) bool);

impl FromRequestParts<Api> for Anonymous {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Self::Rejection> {
        Ok(Self(!matches!(parts.extensions.get::<Origin>(), Some(Origin::Control(_)))))
    }
}

/// A peer that may change things, by the operators of this very moment.
pub(super) struct Operator(pub(super) Peer);

impl FromRequestParts<Api> for Operator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        let Some(Origin::Control(identity)) = parts.extensions.get::<Origin>() else {
            return Err(read_only());
        };
        if api.may_change(identity) {
            return Ok(Self(identity.peer));
        }
        let Peer { uid, .. } = identity.peer;
        if identity.was_passed_on(api.agent_uid, &api.operators.borrow()) {
            return Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "not_permitted",
                exit::NOT_PERMITTED,
                format!(
                    "uid {uid} has connected, and another user, who is no operator of this agent, has \
                     written on the connection"
                ),
            )
            .help("connect anew as the user who is to make the change"));
        }
        Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "not_permitted",
            exit::NOT_PERMITTED,
            format!("uid {uid} may not change anything: it is not an operator of this agent"),
        )
        .help(
            "name the uid or one of its groups in `agent.operators` and reload, \
             or ask as root or as the agent's own user",
        ))
    }
}

/// What the TCP listener says to every change.
pub(super) fn read_only() -> ApiError {
    ApiError::new(
        StatusCode::FORBIDDEN,
        "read_only",
        exit::NOT_PERMITTED,
        "nothing can be changed over TCP",
    )
    .help("use the control socket, for instance with `canary-agent split`")
}
