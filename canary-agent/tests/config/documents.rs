//! `docs/configuration.md` stays true.

use std::{fs, path::Path};

use canary_agent::config::load_str;

use super::support::{MAIN, good};

fn manual() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    fs::read_to_string(path).expect("the manual is there")
}

#[test]
fn the_manuals_example_loads_without_a_warning() {
    let manual = manual();
    let (_, rest) = manual.split_once("```toml\n").expect("an example");
    let (example, _) = rest.split_once("```").expect("its end");
    let loaded = good(example);
    assert_eq!(loaded.warnings, []);
    assert!(!loaded.config.services.is_empty());
}

#[test]
fn the_manual_names_every_key() {
    let manual = manual();
    for (table, text) in [
        ("agent", "[agent]\nQQQ = 1"),
        ("agent.operators", "[agent.operators]\nQQQ = 1"),
        ("agent.capacity", "[agent.capacity]\nQQQ = 1"),
        ("service", "[[service]]\nQQQ = 1"),
        ("service.health", "[[service]]\nhealth.QQQ = 1"),
        ("service.route", "[[service]]\nroute = [{ audience = \"staff\", QQQ = 1 }]"),
        ("audience", "[[audience]]\nQQQ = 1"),
        ("audience.mmdb", "[[audience]]\nmmdb.QQQ = 1"),
        ("gate", "[[gate]]\nQQQ = 1"),
        ("gate.signals", "[[gate]]\nsignals = [{ name = \"connect_failed\", QQQ = 1 }]"),
        ("rollout", "[[rollout]]\nQQQ = 1"),
        ("rollout.steps", "[[rollout]]\nsteps = [{ QQQ = 1 }]"),
        ("rollout.hooks", "[[rollout]]\nhooks = { QQQ = 1 }"),
        ("service.prefix", "[[service]]\nstickiness = \"subnet\"\nprefix.QQQ = 1"),
    ] {
        let errors = load_str(MAIN, text).expect_err("it is bad");
        let unknown =
            errors.iter().find(|e| e.message.contains("QQQ")).expect("the key is unknown");
        let help = unknown.help.as_deref().expect("known keys");
        for key in help.split('`').skip(1).step_by(2) {
            let path = format!("`{table}.{key}`");
            assert!(manual.contains(&path), "{path} is not in the manual");
        }
    }
}

#[test]
fn the_manual_says_what_is_not_in_this_release() {
    let manual = manual();
    let (_, missing) = manual.split_once("## Not in this release").expect("the section");
    assert!(missing.contains("`service.existing = \"move\"` with `forward = \"nat\"`"));
}
