//! What stands in a column as JSON: splits, and what became of backends.

use std::{collections::BTreeMap, net::SocketAddr};

use canary_ebpf_common::share::Share;
use serde_json::{Map, Value};

use super::{Admin, Admins, BackendChange, Split, sqlite::Failure};

/// `{"v2":"5%"}`.
pub(super) fn split_to(split: &Split) -> String {
    object(split.iter().map(|(version, share)| (version.clone(), share.to_string())))
}

/// The other way.
pub(super) fn split_from(text: &str) -> Result<Split, Failure> {
    read(text, "split", |version, share| match share.parse::<Share>() {
        Ok(share) => Ok((version, share)),
        Err(error) => Err(error.to_string()),
    })
}

/// `{"10.0.1.1:443":"drain"}`.
pub(super) fn admins_to(admins: &Admins) -> String {
    object(admins.iter().map(|(addr, admin)| (addr.to_string(), admin.name().to_owned())))
}

/// The other way.
pub(super) fn admins_from(text: &str) -> Result<Admins, Failure> {
    read(text, "backends", |addr, word| Ok((address(&addr)?, admin(&word)?)))
}

/// `{"addr":"10.0.1.1:443","after":"drain","before":"ready"}`.
pub(super) fn backend_to(change: &BackendChange) -> String {
    let BackendChange { addr, before, after } = change;
    let fields = [
        ("addr", addr.to_string()),
        ("before", before.name().to_owned()),
        ("after", after.name().to_owned()),
    ];
    object(fields.into_iter().map(|(key, text)| (key.to_owned(), text)))
}

/// The other way.
pub(super) fn backend_from(text: &str) -> Result<BackendChange, Failure> {
    let fields: BTreeMap<String, String> =
        read(text, "backend", |key, value| Ok::<_, String>((key, value)))?;
    let field = |key: &str| fields.get(key).ok_or_else(|| format!("there is no `{key}`"));
    let change = || -> Result<BackendChange, String> {
        Ok(BackendChange {
            addr: address(field("addr")?)?,
            before: admin(field("before")?)?,
            after: admin(field("after")?)?,
        })
    };
    change().map_err(|reason| Failure::Damaged(format!("backend {text}: {reason}")))
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|error| format!("{text}: {error}"))
}

fn admin(word: &str) -> Result<Admin, String> {
    Admin::named(word)
        .ok_or_else(|| format!("`{word}` is nothing that a backend can be told to be"))
}

fn object(fields: impl Iterator<Item = (String, String)>) -> String {
    let object: Map<_, _> = fields.map(|(key, value)| (key, Value::from(value))).collect();
    Value::Object(object).to_string()
}

/// An object whose values are text, each field made into what it means.
fn read<T: FromIterator<U>, U>(
    text: &str,
    what: &str,
    each: impl Fn(String, String) -> Result<U, String>,
) -> Result<T, Failure> {
    let fields: Result<BTreeMap<String, String>, _> = serde_json::from_str(text);
    let fields = fields.map_err(|error| error.to_string());
    fields
        .and_then(|fields| fields.into_iter().map(|(key, value)| each(key, value)).collect())
        .map_err(|reason| Failure::Damaged(format!("{what} {text}: {reason}")))
}
