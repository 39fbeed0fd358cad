//! The crates that a program is linked with, and their licences.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::output_of;
use crate::tasks;

/// A line for each crate that is linked into the agent: name, version, licence.
///
/// # Errors
/// cargo fails, or says something else.
pub(super) fn list(workspace: &Path) -> Result<String> {
    let mut command = tasks::cargo(workspace);
    command.args(["metadata", "--format-version", "1", "--locked"]);
    command.args(["--filter-platform", &format!("{}-unknown-linux-gnu", std::env::consts::ARCH)]);
    let metadata: Value = serde_json::from_slice(&output_of(&mut command)?)?;
    linked(&metadata, "canary-agent").context("cargo metadata has another form than was expected")
}

fn linked(metadata: &Value, root: &str) -> Option<String> {
    let by_id = |list: &'_ Value| -> Option<HashMap<String, Value>> {
        let pairs = list.as_array()?.iter();
        pairs.map(|one| Some((one["id"].as_str()?.to_owned(), one.clone()))).collect()
    };
    let packages = by_id(&metadata["packages"])?;
    let nodes = by_id(&metadata["resolve"]["nodes"])?;
    let start = packages.values().find(|package| package["name"] == root)?;
    let mut todo = vec![start["id"].as_str()?.to_owned()];
    let mut seen = BTreeSet::new();
    let mut lines = BTreeSet::new();
    while let Some(id) = todo.pop() {
        if !seen.insert(id.clone()) {
            continue;
        }
        let package = packages.get(&id)?;
        // Those of this workspace have no source, and are what the package is of.
        if !package["source"].is_null() {
            let licence = package["license"].as_str().unwrap_or("see its source");
            lines.insert(format!(
                "{} {}: {licence}",
                package["name"].as_str()?,
                package["version"].as_str()?
            ));
        }
        for dependency in nodes.get(&id)?["deps"].as_array()? {
            // `null` stands for what is neither for tests nor for a build script.
            let linked =
                dependency["dep_kinds"].as_array()?.iter().any(|one| one["kind"].is_null());
            if linked {
                todo.push(dependency["pkg"].as_str()?.to_owned());
            }
        }
    }
    Some(lines.into_iter().map(|line| line + "\n").collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn crates_of_tests_and_build_scripts_are_not_linked() {
        let package = |name: &str, source: Value| json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT", "source": source});
        let needs = |pkg: &str, kind: Value| json!({"pkg": pkg, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [
                package("agent", Value::Null), package("a", "r".into()), package("b", "r".into()),
                package("c", "r".into()), package("d", "r".into()),
            ],
            "resolve": {"nodes": [
                {"id": "agent", "deps": [
                    needs("a", Value::Null), needs("b", "dev".into()), needs("c", "build".into()),
                ]},
                {"id": "a", "deps": [needs("d", Value::Null)]},
                {"id": "b", "deps": []}, {"id": "c", "deps": []}, {"id": "d", "deps": []},
            ]},
        });
        assert_eq!(linked(&metadata, "agent").as_deref(), Some("a 1.0.0: MIT\nd 1.0.0: MIT\n"));
        assert_eq!(linked(&json!({}), "agent"), None);
    }
}
