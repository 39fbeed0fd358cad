//! Tests that keep the tree tidy: rules that no other tool checks.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Longest source file, in lines.
const LINES_MAX: usize = 900;

/// Folders of the crates.
const CRATES: [&str; 5] = ["canary-agent", "canary-ebpf", "canary-ebpf-common", "tests", "xtask"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Files of the tree with one of the endings, with paths relative to it.
fn files(endings: &[&str]) -> Vec<(String, String)> {
    let root = workspace();
    let mut folders = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                // What cargo makes, what git keeps, and what editors and browsers' packages bring.
                if !["target", ".git", "node_modules"].contains(&name.as_str()) {
                    folders.push(path);
                }
            } else if kind.is_file() && endings.iter().any(|ending| name.ends_with(ending)) {
                let relative = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
                // Recordings and other bytes are not text.
                if let Ok(text) = fs::read_to_string(&path) {
                    found.push((relative, text));
                }
            }
        }
    }
    assert!(!found.is_empty(), "no file with the endings {endings:?}");
    found
}

/// Fails with every line that `wrong` objects to.
#[track_caller]
fn check_lines(endings: &[&str], wrong: impl Fn(&str) -> bool) {
    let mut objections = Vec::new();
    for (path, text) in files(endings) {
        for (line, number) in text.lines().zip(1..) {
            if wrong(line) {
                objections.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    assert!(objections.is_empty(), "\n{}", objections.join("\n"));
}

#[test]
fn every_source_file_says_what_it_owns() {
    let bare: Vec<String> = files(&[".rs"])
        .into_iter()
        .filter(|(_, text)| {
            // After a shebang or inner attributes, at the latest.
            let docs = text
                .lines()
                .find(|line| !line.starts_with("#!") && !line.is_empty())
                .and_then(|line| line.strip_prefix("//! "));
            docs.is_none()
        })
        .map(|(path, _)| path)
        .collect();
    assert!(bare.is_empty(), "no `//!` at the beginning of {bare:?}");
}

#[test]
fn lints_are_expected_not_allowed() {
    // Written in two, so that this line does not object to itself.
    let attribute = concat!("[al", "low(");
    check_lines(&[".rs"], |line| line.contains(attribute));
}

#[test]
fn nothing_is_left_to_do() {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
    check_lines(&[".rs", ".toml", ".md", ".yml", ".yaml", ".sh"], |line| {
        marks.iter().any(|mark| {
            line.match_indices(mark).any(|(at, _)| {
                let letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
                !line[..at].ends_with(letter) && !line[at + mark.len()..].starts_with(letter)
            })
        })
    });
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let long: Vec<(String, usize)> = files(&[".rs"])
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .collect();
    assert!(long.is_empty(), "more than {LINES_MAX} lines: {long:?}");
}

#[test]
fn no_path_of_one_persons_machine_is_in_the_tree() {
    let homes = [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/")];
    check_lines(&[".rs", ".toml", ".md", ".json", ".sh", ".yml", "run"], |line| {
        homes.iter().any(|home| line.contains(home))
    });
}

#[test]
fn licences_are_where_their_readers_look() {
    for name in ["LICENSE-APACHE", "LICENSE-MIT"] {
        let text = fs::read_to_string(workspace().join(name)).unwrap();
        assert!(text.len() > 500, "{name} is no licence");
    }
    for name in CRATES {
        let text = fs::read_to_string(workspace().join(name).join("Cargo.toml")).unwrap();
        assert!(text.contains("license"), "{name} has no licence");
        assert!(text.contains("[lints]\nworkspace = true"), "{name} has lints of its own");
    }
}

#[test]
fn the_agent_loads_no_program_but_the_one_that_was_built_in() {
    let embeds = concat!("include_bytes_", "aligned!(");
    let mut places = Vec::new();
    for (path, text) in files(&[".rs"]) {
        if !path.starts_with("canary-agent/src") {
            continue;
        }
        for (line, number) in text.lines().zip(1..) {
            let from_file = ["load_file(", "Ebpf::load("].iter().any(|call| line.contains(call));
            assert!(!from_file, "{path}:{number} may load a program from outside: {line}");
            if line.contains(embeds) {
                places.push(path.clone());
            }
        }
    }
    assert!(places.iter().all(|path| path.starts_with("canary-agent/src/datapath/")), "{places:?}");
    assert!(!places.is_empty());
}
