//! What is in files besides the configuration, and what is written in one line: lists of networks,
//! recordings of windows, MaxMind DB files, questions about them, shares, durations.
//!
//! The first byte says which of them the others are; the seeds have one of each.
#![no_main]

use std::{sync::LazyLock, time::Duration};

use canary_agent::{
    audience::{
        Networks,
        expression::{Asked, Expression, Value},
        file, members,
        mmdb::Database,
        network,
    },
    config::{self, load_str, model},
    rollout::{
        gate::{Gate, Window},
        record::Reader,
    },
};
use canary_ebpf_common::share::Share;
use libfuzzer_sys::{Corpus, fuzz_target};

static TERMS: LazyLock<model::Gate> = LazyLock::new(|| {
    let text = include_str!("../seeds/config/whole.toml");
    let loaded = load_str("agent.toml", text).expect("a good configuration");
    loaded.config.gates.into_iter().next().expect("a gate")
});

static RECORD: LazyLock<Value> = LazyLock::new(|| {
    let text = r#"{"country": {"iso_code": "US"}, "subdivisions": [{"iso_code": "IA"}],
        "location": {"accuracy_radius": 20, "latitude": 41.6}, "anonymous": true}"#;
    serde_json::from_str(text).expect("a record")
});

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let Some((kind, rest)) = bytes.split_first() else { return Corpus::Reject };
    let text = str::from_utf8(rest).ok();
    match (kind, text) {
        (b'e', Some(text)) => expression(text),
        (b'n', Some(text)) => networks(text),
        (b's', Some(text)) => share(text),
        (b't', Some(text)) => drop(config::duration(text).map_err(|why| assert!(!why.is_empty()))),
        (b'l', _) => list(rest),
        (b'r', _) => recording(rest),
        (b'd', _) => database(rest),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

fn expression(text: &str) {
    match Expression::parse(text) {
        Ok(expression) => {
            assert_eq!(expression.text(), text);
            let mut asked = Asked::new(&expression);
            let answer = asked.ask(&RECORD);
            assert_eq!(asked.ask(&RECORD), answer);
            let _ = asked.check("City.mmdb", &["country.iso_code".to_owned()]);
        }
        Err(error) => {
            let span = error.span.start..error.span.end;
            assert!(text.get(span).is_some(), "{error:?} is not in the text");
            assert!(!error.to_string().is_empty());
        }
    }
}

fn networks(text: &str) {
    match network::parse(text) {
        Ok(net) => assert_eq!(network::parse(&net.to_string()), Ok(net)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    match members::member(text) {
        Ok(net) => assert_eq!(members::member(&net.to_string()), Ok(net)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A share is shown so that it is read as the same one, and no service has more than all buckets.
fn share(text: &str) {
    match text.parse::<Share>() {
        Ok(share) => {
            assert_eq!(share.to_string().parse(), Ok(share));
            assert!((0.0..=1.0).contains(&share.fraction()));
            for total in [1 << 12, 1 << 16, 1 << 20] {
                let buckets = share.buckets(total);
                assert!(buckets <= total);
                assert_eq!(buckets == 0, share == Share::ZERO);
                assert_eq!(buckets == total, share == Share::ALL);
            }
            assert!(Share::fit_together([share, Share::rest([share])]));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn list(bytes: &[u8]) {
    for read in [file::parse(bytes), file::parse_members(bytes)] {
        match read {
            Ok(nets) => {
                let networks = Networks::new(nets.clone());
                assert!(networks.len() <= nets.len());
                assert!(nets.iter().all(|net| networks.find(net.network()).is_some()));
                assert_eq!(Networks::new(networks.iter()), networks);
            }
            Err(file::FileError::Lines(bad)) => {
                let lines = bytes.split(|byte| *byte == b'\n').count();
                for bad in bad {
                    assert!((1..=lines).contains(&bad.line) && bad.column >= 1);
                }
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

/// As `replay` does it, with a gate that has some of the signals.
fn recording(bytes: &[u8]) {
    let mut gate = Gate::new(&TERMS);
    let kinds = gate.signals().iter().map(|signal| signal.kind).collect();
    let mut reader = Reader::new(bytes, kinds);
    let (mut first, mut elapsed) = (None, Duration::ZERO);
    while let Some(recorded) = reader.next_window().expect("bytes can be read") {
        assert!(!recorded.lines.is_empty());
        let first = *first.get_or_insert(recorded.window);
        let before = elapsed;
        elapsed = (recorded.window - first).saturating_add(Duration::from_secs(1));
        let counts: Vec<_> = recorded.lines.iter().map(|line| (line.signal, line.counts)).collect();
        let watched = elapsed.saturating_sub(before);
        gate.watch(&Window { elapsed, watched, complete: true, counts: &counts });
        for seen in &gate.progress().signals {
            assert!(!seen.fail.ln().is_nan() && !seen.pass.ln().is_nan(), "{seen:?}");
        }
    }
    assert!(reader.problems().len() <= 101);
    let lines = bytes.split(|byte| *byte == b'\n').count() as u64;
    assert!(reader.problems().iter().all(|bad| (1..=lines).contains(&bad.line)));
    let kept = serde_json::to_string(gate.progress()).expect("serialisable");
    let progress = serde_json::from_str(&kept).expect("reads back");
    let again = Gate::resume(&TERMS, progress).expect("the same gate");
    assert_eq!(again.progress(), gate.progress());
}

/// A file is any bytes; the questions are always the same ones.
fn database(bytes: &[u8]) {
    let Ok(database) = Database::from_bytes("City.mmdb".to_owned(), bytes.to_vec()) else { return };
    let _ = database.about();
    for question in [r#"country.iso_code == "US""#, "!exists(location)", "location.latitude > 1"] {
        let Ok(expression) = Expression::parse(question) else { continue };
        if let Ok(selected) = database.select(&expression) {
            assert!(selected.answering <= selected.records);
        }
    }
}
