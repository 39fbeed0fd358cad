//! Documents that list what the code lists.

use std::{fmt::Write as _, fs, path::Path};

use canary_agent::doctor;
use canary_ebpf_common::abi::{Reason, ReasonVerdict};

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn every_reason_is_in_the_packet_document_with_its_verdict_and_meaning() {
    let mut rows = String::new();
    for reason in Reason::ALL {
        let verdict = match reason.verdict() {
            ReasonVerdict::Pass => "pass",
            ReasonVerdict::Drop => "drop",
        };
        let meaning = reason.explanation().trim();
        writeln!(rows, "| `{}` | {verdict} | {meaning} |", reason.name()).unwrap();
    }
    let document = document("packets.md");
    assert!(document.contains(&rows), "docs/packets.md should hold these rows:\n{rows}");
}

#[test]
fn every_check_of_doctor_is_in_the_manual() {
    let manual = document("cli.md");
    for name in doctor::Name::ALL {
        let row = format!("\n| `{}` | ", doctor::name(name));
        assert!(manual.contains(&row), "docs/cli.md has no row for{row}");
    }
}
