//! What the configuration format has and this release does not do.
//!
//! Such keys and values are refused: to accept and ignore them would promise
//! something. A release that brings one deletes its line here.

/// Keys, with the tables that they are in.
const KEYS: &[&str] = &["rollout.steps.audience"];

/// Whether `path` is a key of a later release.
pub(super) fn is_key(path: &str) -> bool {
    KEYS.contains(&path)
}

/// The error for `what`.
pub(super) fn message(what: &str) -> String {
    format!("`{what}` is not supported by this release")
}
