//! Documents that list what the code lists.

use std::{fmt::Write as _, fs, path::Path};

use canary_agent::doctor;
use canary_ebpf_common::{abi::Reason, decap::Outcome};

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn every_reason_is_in_the_packet_document_with_its_verdict_and_meaning() {
    let mut rows = String::new();
    for reason in Reason::ALL {
        let verdict = reason.verdict().name();
        let meaning = reason.explanation().trim();
        writeln!(rows, "| `{}` | {verdict} | {meaning} |", reason.name()).unwrap();
    }
    let document = document("packets.md");
    assert!(document.contains(&rows), "docs/packets.md should hold these rows:\n{rows}");
}

#[test]
fn every_outcome_of_unwrapping_is_in_the_manual() {
    let manual = document("cli.md");
    for outcome in Outcome::ALL {
        let row = format!("| `{}` |{} |\n", outcome.name(), outcome.explanation());
        assert!(manual.contains(&row), "docs/cli.md has no row for{row}");
    }
}

#[test]
fn every_check_of_doctor_is_in_the_manual() {
    let manual = document("cli.md");
    for name in doctor::Name::ALL {
        let row = format!("\n| `{}` | ", doctor::name(name));
        assert!(manual.contains(&row), "docs/cli.md has no row for{row}");
    }
}

/// The text of every file below a folder whose name ends so.
fn texts(folder: &Path, ending: &str, all: &mut String) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            texts(&path, ending, all);
        } else if entry.file_name().to_string_lossy().ends_with(ending) {
            all.push_str(&fs::read_to_string(&path).unwrap_or_default());
        }
    }
}

#[test]
fn the_threat_model_names_tests_that_exist() {
    let (mut code, mut cases) = (String::new(), String::new());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for folder in [
        "canary-agent/src",
        "canary-agent/tests",
        "canary-ebpf-common",
        "tests/src",
        "tests/tests",
        "xtask/src",
    ] {
        texts(&root.join(folder), ".rs", &mut code);
    }
    texts(&root.join("tests/cases"), ".toml", &mut cases);
    let document = document("security.md");
    let rows = document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---"));
    let mut held = 0;
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, .., by] = cells[..] else { panic!("a row of one cell: {row}") };
        for name in by.split('`').skip(1).step_by(2).filter(|word| word.contains('_')) {
            let function = format!("fn {name}(");
            assert!(code.contains(&function), "docs/security.md names `{name}`, which is no test");
            held += 1;
        }
        for name in by.split('"').skip(1).step_by(2) {
            let case = format!("name = \"{name}\"");
            assert!(cases.contains(&case), "docs/security.md names the case \"{name}\"");
            held += 1;
        }
    }
    assert!(held > 30, "{held} tests are named");
}
