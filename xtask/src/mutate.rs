//! Takes the rules of tracking out of the code, one after the other, and looks that the tests
//! notice.
//!
//! The list is data: `tests/mutations.toml`. A mutation is made in the tree itself, where
//! everything else is built already, and taken back however the task ends, unless it is killed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::{
    supervise,
    tasks::{cargo, target_folder},
};

/// What to take out.
#[derive(Debug, clap::Args)]
pub(crate) struct Request {
    /// Only those whose name, or whose test's, holds this.
    filter: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutation: Vec<Mutation>,
}

/// A rule taken out, or a part of one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutation {
    name: String,
    /// The file, from the workspace's folder on.
    file: PathBuf,
    from: String,
    to: String,
    /// The test of `rules` that has to fail.
    fails: String,
}

impl Mutation {
    /// The file's text with the rule taken out.
    fn apply(&self, text: &str) -> Result<String> {
        let count = text.matches(&self.from).count();
        ensure!(
            count == 1,
            "`{}`: what it replaces stands in {} {count} times, and has to stand there once: bring \
             tests/mutations.toml up to date",
            self.name,
            self.file.display()
        );
        Ok(text.replacen(&self.from, &self.to, 1))
    }

    fn concerns(&self, filter: &str) -> bool {
        self.name.contains(filter) || self.fails.contains(filter)
    }
}

fn list(workspace: &Path) -> Result<Vec<Mutation>> {
    let path = workspace.join("tests/mutations.toml");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let list: List = toml::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(list.mutation)
}

/// A file that is another for a while.
struct Replaced {
    path: PathBuf,
    text: String,
}

impl Replaced {
    fn new(workspace: &Path, mutation: &Mutation) -> Result<Self> {
        let path = workspace.join(&mutation.file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mutated = mutation.apply(&text)?;
        let replaced = Self { path, text };
        fs::write(&replaced.path, mutated).with_context(|| replaced.path.display().to_string())?;
        Ok(replaced)
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, &self.text) {
            eprintln!("xtask: {}: {error}: take it back by git checkout", self.path.display());
        }
    }
}

/// What came of a mutation.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Its test fails, as one of so many.
    Noticed(usize),
    /// Its test passes.
    Missed(Vec<String>),
    /// No test ran.
    NotBuilt,
}

/// Runs the tests of the rule that a test is of.
fn outcome(workspace: &Path, fails: &str) -> Result<Outcome> {
    let rule: String = fails.split_inclusive('_').take(2).collect();
    let mut command: Command = cargo(workspace);
    // A line of output for each mutation is enough.
    command.args(["test", "--quiet", "-p", "canary-tests", "--test", "rules", "--", &rule]);
    let log = fs::File::create(target_folder(workspace).join("mutate.log"))?;
    command.stderr(log);
    let (mut failed, mut ran) = (Vec::new(), false);
    supervise::run_stdout(&mut command, |line| {
        ran |= line.starts_with("test result:");
        // The list at the end: one name a line.
        if let Some(name) = line.strip_prefix("    ").filter(|name| name.contains("::rule_")) {
            let name = name.rsplit("::").next().unwrap_or(name).to_owned();
            if !failed.contains(&name) {
                failed.push(name);
            }
        }
    })?;
    Ok(match (ran, failed.iter().any(|name| name == fails)) {
        (false, _) => Outcome::NotBuilt,
        (true, true) => Outcome::Noticed(failed.len()),
        (true, false) => Outcome::Missed(failed),
    })
}

/// Makes each mutation of the list and runs its rule's tests.
///
/// # Errors
/// A mutation can't be made, the tests can't be started, or the task is interrupted.
pub(crate) fn run(workspace: &Path, request: &Request) -> Result<ExitCode> {
    let filter = request.filter.as_deref().unwrap_or_default();
    let mutations = list(workspace)?;
    let chosen: Vec<&Mutation> = mutations.iter().filter(|m| m.concerns(filter)).collect();
    if chosen.is_empty() {
        bail!("no mutation is called `{filter}`: see tests/mutations.toml");
    }
    let mut missed = 0;
    for mutation in &chosen {
        let replaced = Replaced::new(workspace, mutation)?;
        let outcome = outcome(workspace, &mutation.fails);
        drop(replaced);
        let said = match outcome? {
            Outcome::Noticed(1) => format!("noticed by {}", mutation.fails),
            Outcome::Noticed(all) => format!("noticed by {} and {} more", mutation.fails, all - 1),
            Outcome::Missed(failed) => {
                missed += 1;
                format!("NOT NOTICED by {}; fails: {failed:?}", mutation.fails)
            }
            Outcome::NotBuilt => {
                missed += 1;
                "NOT TRIED: it does not build; see target/mutate.log".to_owned()
            }
        };
        println!("{}: {said}", mutation.name);
    }
    println!("{} mutations, {missed} not noticed", chosen.len());
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn workspace() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    #[test]
    fn every_mutation_can_be_made_and_names_a_test_and_every_rule_has_one() {
        let workspace = workspace();
        let tests: String = ["steering", "planning", "translated", "keys"]
            .map(|file| {
                let path = workspace.join(format!("tests/tests/rules/{file}.rs"));
                fs::read_to_string(path).unwrap()
            })
            .concat();
        let mutations = list(&workspace).unwrap();
        for mutation in &mutations {
            let text = fs::read_to_string(workspace.join(&mutation.file)).unwrap();
            assert_ne!(mutation.apply(&text).unwrap(), text, "{}", mutation.name);
            assert!(tests.contains(&format!("fn {}()", mutation.fails)), "{}", mutation.fails);
        }
        let rules: BTreeSet<&str> = mutations.iter().map(|m| &m.fails[..8]).collect();
        assert_eq!(rules.len(), 16, "{rules:?}");
        let names: BTreeSet<&str> = mutations.iter().map(|m| &m.name[..]).collect();
        assert_eq!(names.len(), mutations.len(), "a name stands for one");
    }
}
