//! What stands in a column as JSON: splits, lists, and what became of backends and freezes.

use std::{collections::BTreeMap, net::SocketAddr};

use canary_ebpf_common::share::Share;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{Admin, Admins, BackendChange, FreezeChange, Split, sqlite::Failure};

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

/// `[{"addr":"10.0.1.1:443","after":"drain","before":"ready"}]`; nothing for none.
pub(super) fn backends_to(changes: &[BackendChange]) -> Option<String> {
    let one = |change: &BackendChange| {
        let BackendChange { addr, before, after } = change;
        json!({ "addr": addr.to_string(), "before": before.name(), "after": after.name() })
    };
    (!changes.is_empty()).then(|| changes.iter().map(one).collect::<Value>().to_string())
}

/// The other way.
pub(super) fn backends_from(text: Option<String>) -> Result<Vec<BackendChange>, Failure> {
    let Some(text) = text else { return Ok(Vec::new()) };
    let one = |fields: &BTreeMap<String, String>| -> Result<BackendChange, String> {
        let field = |key: &str| fields.get(key).ok_or_else(|| format!("there is no `{key}`"));
        Ok(BackendChange {
            addr: address(field("addr")?)?,
            before: admin(field("before")?)?,
            after: admin(field("after")?)?,
        })
    };
    let list: Result<Vec<BTreeMap<String, String>>, _> = serde_json::from_str(&text);
    let list = list.map_err(|error| error.to_string());
    list.and_then(|list| list.iter().map(one).collect())
        .map_err(|reason| Failure::Damaged(format!("backends {text}: {reason}")))
}

/// `{"after":"the night before","before":null}`.
pub(super) fn freeze_to(change: &FreezeChange) -> String {
    let FreezeChange { before, after } = change;
    json!({ "before": before, "after": after }).to_string()
}

/// The other way.
pub(super) fn freeze_from(text: &str) -> Result<FreezeChange, Failure> {
    let fields: BTreeMap<String, Option<String>> = parsed("freeze", text)?;
    let field = |key: &str| fields.get(key).cloned().flatten();
    Ok(FreezeChange { before: field("before"), after: field("after") })
}

/// What stands in a column as a list; an empty one for nothing.
pub(super) fn list_from<T: DeserializeOwned>(
    what: &str,
    text: Option<String>,
) -> Result<Vec<T>, Failure> {
    text.map_or_else(|| Ok(Vec::new()), |text| parsed(what, &text))
}

/// The other way; nothing for an empty one.
pub(super) fn list_to<T: Clone + Into<Value>>(list: &[T]) -> Option<String> {
    (!list.is_empty()).then(|| Value::from(list.to_vec()).to_string())
}

fn parsed<T: DeserializeOwned>(what: &str, text: &str) -> Result<T, Failure> {
    serde_json::from_str(text).map_err(|error| Failure::Damaged(format!("{what} {text}: {error}")))
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
