//! What the configuration format has and this release does not do.
//!
//! Such values are refused: to accept and ignore them would promise something.

/// The error for `what`.
pub(super) fn message(what: &str) -> String {
    format!("`{what}` is not supported by this release")
}
