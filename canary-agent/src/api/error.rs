//! Errors as the socket tells them: an [`ErrorBody`] with a fitting status code.
//!
//! Owns the mapping from a refusal's word to a status code. Must not know of
//! routes or connections.

use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};

use super::model::{ErrorBody, ErrorDetail};
use crate::daemon::{Refusal, ReloadError};

/// A request that gets an error for an answer.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    detail: ErrorDetail,
}

/// Exit codes that a command ends with, as the contract numbers them.
pub(super) mod exit {
    /// It was tried and did not work.
    pub(in crate::api) const FAILED: u8 = 1;
    /// It was asked wrongly.
    pub(in crate::api) const USAGE: u8 = 2;
    /// The configuration is wrong.
    pub(in crate::api) const BAD_CONFIG: u8 = 78;
    /// The daemon does not answer.
    pub(in crate::api) const UNREACHABLE: u8 = 5;
    /// Who asks may not.
    pub(in crate::api) const NOT_PERMITTED: u8 = 77;
}

impl ApiError {
    /// An error with its word for programs and its sentence for people.
    pub(super) fn new(
        status: StatusCode,
        code: &str,
        exit_code: u8,
        message: impl Into<String>,
    ) -> Self {
        let detail = ErrorDetail {
            code: code.to_owned(),
            message: message.into(),
            help: None,
            exit_code,
            diagnostics: Vec::new(),
        };
        Self { status, detail }
    }

    /// The same with the next step.
    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.detail.help = Some(help.into());
        self
    }

    /// A request that is no good whoever asks it, and when.
    pub(super) fn bad_request(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, exit::USAGE, message)
    }

    /// The whole response as bytes of HTTP/1.1, for connections that no request
    /// was read from. The connection is to be closed after it.
    pub(super) fn raw(&self) -> Vec<u8> {
        let body = serde_json::to_vec(&self.body()).unwrap_or_default();
        let reason = self.status.canonical_reason().unwrap_or("Error");
        let mut raw = format!(
            "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             retry-after: 1\r\nconnection: close\r\n\r\n",
            self.status.as_u16(),
            body.len()
        )
        .into_bytes();
        raw.extend_from_slice(&body);
        raw
    }

    fn body(&self) -> ErrorBody {
        ErrorBody { error: self.detail.clone() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let later = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS];
        if later.contains(&self.status) {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let Refusal { code, message, help, exit_code } = refusal;
        let error = Self::new(status_of(code, exit_code), code, exit_code, message);
        match help {
            Some(help) => error.help(help),
            None => error,
        }
    }
}

impl From<ReloadError> for ApiError {
    fn from(error: ReloadError) -> Self {
        let message = error.to_string();
        match error {
            ReloadError::Refused(refusal) => refusal.into(),
            ReloadError::Config(diagnostics) => {
                let status = StatusCode::UNPROCESSABLE_ENTITY;
                let mut error = Self::new(status, "bad_config", exit::BAD_CONFIG, message)
                    .help("`canary-agent check` shows them all; what runs has not changed");
                error.detail.diagnostics = diagnostics;
                error
            }
        }
    }
}

/// The status code for a refusal: by its word where the word says it, else by
/// the exit code, so that a refusal that is new to this table still fits.
fn status_of(code: &str, exit_code: u8) -> StatusCode {
    match code {
        "unknown_service" | "unknown_audience" => StatusCode::NOT_FOUND,
        "stopping" => StatusCode::SERVICE_UNAVAILABLE,
        _ if code.starts_with("unknown_") => StatusCode::UNPROCESSABLE_ENTITY,
        _ if code.starts_with("bad_") => StatusCode::BAD_REQUEST,
        _ => match exit_code {
            exit::USAGE => StatusCode::BAD_REQUEST,
            exit::UNREACHABLE => StatusCode::SERVICE_UNAVAILABLE,
            exit::NOT_PERMITTED => StatusCode::FORBIDDEN,
            _ => StatusCode::CONFLICT,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_gets_the_status_that_fits_it() {
        for (code, exit_code, status) in [
            ("unknown_service", 1, 404),
            ("unknown_audience", 1, 404),
            ("unknown_version", 1, 422),
            ("bad_share", 2, 400),
            ("too_many_shares", 2, 400),
            ("stopping", 5, 503),
            ("not_permitted", 77, 403),
            ("state_full", 1, 409),
        ] {
            assert_eq!(status_of(code, exit_code).as_u16(), status, "{code}");
        }
    }

    #[test]
    fn the_raw_form_is_a_whole_response() {
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", 5, "busy \"now\"");
        let raw = String::from_utf8(error.raw()).expect("text");
        let (head, body) = raw.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.1 503 Service Unavailable\r\n"));
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())));
        let body: ErrorBody = serde_json::from_str(body).expect("JSON");
        assert_eq!(body.error.message, "busy \"now\"");
    }
}
