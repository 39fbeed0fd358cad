//! Whatever the input: no panic, and every place in its file.

use std::{fmt::Write as _, path::Path};

use canary_agent::config::{Severity, load_bytes};
use proptest::prelude::*;

use super::support::{EXAMPLE, Host, MAIN, check_places};

/// `text` with a few of its characters replaced, left out, doubled or cut off.
fn mutated(text: &'static str) -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        Just("\"".to_owned()),
        Just("[".to_owned()),
        Just("]]".to_owned()),
        Just("{".to_owned()),
        Just("}".to_owned()),
        Just("=".to_owned()),
        Just("\n".to_owned()),
        Just("\r\n".to_owned()),
        Just("-1".to_owned()),
        Just("0".to_owned()),
        Just("99999999999".to_owned()),
        Just("é\u{202e}\u{0}".to_owned()),
        Just("[service]\n".to_owned()),
        Just("[[agent]]\n".to_owned()),
        any::<char>().prop_map(String::from),
    ];
    let edits = prop::collection::vec((any::<prop::sample::Index>(), 0..4_usize, pieces), 1..8);
    edits.prop_map(move |edits| {
        let mut chars: Vec<char> = text.chars().collect();
        for (at, removed, piece) in edits {
            if chars.is_empty() {
                break;
            }
            let at = at.index(chars.len());
            let end = (at + removed).min(chars.len());
            chars.splice(at..end, piece.chars());
        }
        chars.into_iter().collect()
    })
}

/// A document that is TOML, of keys that the configuration has, with any values.
fn document() -> impl Strategy<Value = String> {
    let keys = [
        "agent",
        "interfaces",
        "capacity",
        "services",
        "operators",
        "uids",
        "nat_ports",
        "listen",
        "service",
        "name",
        "vip",
        "ports",
        "forward",
        "split",
        "health",
        "type",
        "prefix",
        "v4",
        "versions",
        "stable",
        "backends",
        "addr",
        "weight",
        "buckets",
        "drain",
        "control",
        "audience",
        "cidr",
        "file",
        "mmdb",
        "where",
        "dynamic",
        "ttl",
        "route",
        "gate",
        "alpha",
        "deadline",
        "signals",
        "over",
        "tolerate",
        "pass_below",
        "observe",
        "prometheus",
        "query",
        "above",
        "command",
        "webhook",
        "interval",
        "rise",
        "rollout",
        "to",
        "steps",
        "hold",
        "pause",
        "on_fail",
        "windows",
        "hooks",
        "confirm",
        "secret",
    ];
    let scalar = prop_oneof![
        any::<i64>().prop_map(|n| n.to_string()),
        any::<bool>().prop_map(|b| b.to_string()),
        Just("nan".to_owned()),
        Just("0.01".to_owned()),
        Just("1.5".to_owned()),
        Just("1979-05-27".to_owned()),
        prop::sample::select(vec![
            "10.0.0.1:80",
            "[::1]:80",
            "203.0.113.1",
            "tcp/443",
            "5%",
            "30s",
            "stable",
            "eth0",
            "connect_failed",
            "slow_handshake",
            "control:p95",
            "http://127.0.0.1:9090",
            "Mon-Thu 09:00-16:00 Europe/Berlin",
            "step-back",
            "/bin/true",
            "",
        ])
        .prop_map(|s| format!("\"{s}\"")),
        "[ -!#-\\[\\]-~é]{0,12}".prop_map(|s| format!("\"{s}\"")),
    ];
    let key = prop::sample::select(keys.to_vec());
    let value = scalar.prop_recursive(3, 24, 4, move |inner| {
        let key = prop::sample::select(keys.to_vec());
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4)
                .prop_map(|items| format!("[{}]", items.join(", "))),
            prop::collection::btree_map(key, inner, 0..4).prop_map(|pairs| {
                let pairs: Vec<String> = pairs.iter().map(|(k, v)| format!("{k} = {v}")).collect();
                format!("{{ {} }}", pairs.join(", "))
            }),
        ]
    });
    let header = prop::sample::select(vec![
        "[agent]",
        "[[service]]",
        "[service.versions.stable]",
        "[service.health]",
        "[[gate]]",
        "",
    ]);
    let section = (header, prop::collection::btree_map(key, value, 0..6));
    prop::collection::vec(section, 0..5).prop_map(|sections| {
        let mut text = String::new();
        for (header, pairs) in sections {
            text.push_str(header);
            text.push('\n');
            for (key, value) in pairs {
                let _ = writeln!(text, "{key} = {value}");
            }
        }
        text
    })
}

fn any_input(bytes: &[u8]) {
    let files = [(Path::new(MAIN), bytes)];
    match load_bytes(&files, &Host) {
        Ok(loaded) => {
            check_places(&files, &loaded.warnings);
            assert!(loaded.warnings.iter().all(|w| w.severity == Severity::Warning));
            let agent = &loaded.config.agent;
            assert!(!agent.interfaces.is_empty() || loaded.config.services.is_empty());
            for service in &loaded.config.services {
                assert!(service.control < service.versions.len());
                assert!(service.versions.iter().all(|v| !v.backends.is_empty()));
                assert!(!service.vips.is_empty() && !service.ports.is_empty());
            }
        }
        Err(errors) => {
            assert!(errors.iter().any(|e| e.severity == Severity::Error));
            check_places(&files, &errors);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_bytes_are_judged_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        any_input(&bytes);
    }

    #[test]
    fn any_text_is_judged_without_panic(text in "\\PC{0,200}") {
        any_input(text.as_bytes());
    }

    #[test]
    fn a_slip_in_a_good_file_is_judged_without_panic(text in mutated(EXAMPLE)) {
        any_input(text.as_bytes());
    }

    #[test]
    fn any_document_is_judged_without_panic(text in document()) {
        any_input(text.as_bytes());
    }
}
