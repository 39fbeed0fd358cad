//! The metrics page: that it parses, says what the status says, and is documented.
//! The status comes from a scripted loop (see `support`).

use std::{collections::BTreeMap, time::Duration};

use canary_agent::{
    api::model::{HandshakeBucket, VersionSignalsStatus},
    telemetry::{Exposition, Metrics},
};

use crate::support::{self, Agent, short};

/// A page by the rules of the Prometheus text format 0.0.4: families with their
/// types, and samples by name and labels.
#[derive(Debug, Default)]
struct Page {
    types: BTreeMap<String, String>,
    samples: BTreeMap<String, f64>,
}

fn parse(text: &str) -> Page {
    let mut page = Page::default();
    let mut family: Option<String> = None;
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').expect("a help text");
            assert!(!help.is_empty());
            family = Some(name.to_owned());
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            assert_eq!(family.as_deref(), Some(name), "help, then type");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            let twice = page.types.insert(name.to_owned(), kind.to_owned());
            assert_eq!(twice, None, "{name} twice");
        } else {
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let name = series.split('{').next().expect("a name");
            let family = family.as_deref().expect("a family");
            let suffix = name.strip_prefix(family).expect("the family's name");
            let suffixes: &[&str] = match page.types[family].as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            assert!(suffixes.contains(&suffix), "{line}");
            labels(series.strip_prefix(name).expect("begins with it"));
            let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
            let twice = page.samples.insert(series.to_owned(), value);
            assert_eq!(twice, None, "{series} twice");
        }
    }
    page
}

fn labels(text: &str) {
    let Some(mut rest) = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')) else {
        assert_eq!(text, "");
        return;
    };
    while !rest.is_empty() {
        let (name, value) = rest.split_once("=\"").expect("a label");
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
        let mut escaped = false;
        let end = value
            .find(|c: char| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            })
            .expect("a closing quote");
        rest = value[end + 1..].trim_start_matches(',');
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_says_what_the_status_says() {
    let agent = Agent::start(short()).await;
    agent.metrics.split_applied(Duration::from_millis(3));
    let answer = agent.ask("GET", "/metrics", None).await;
    assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
    let page = parse(&answer.body);
    for (series, value) in [
        (r#"canary_build_info{version="0.1.0",abi="1"}"#, 1.0),
        ("canary_uptime_seconds", 3_725.5),
        ("canary_revision", 7.0),
        ("canary_alerts", 1.0),
        (r#"canary_interface_attached{interface="eth0",mode="native"}"#, 1.0),
        (r#"canary_interface_attached{interface="eth1",mode=""}"#, 0.0),
        (r#"canary_service_buckets{service="shop"}"#, 65_536.0),
        (r#"canary_service_tracked_buckets{service="shop"}"#, 3_277.0),
        (r#"canary_version_share_asked_ratio{service="shop",version="v2"}"#, 0.05),
        (r#"canary_version_share_in_force_ratio{service="shop",version="v2"}"#, 3_277.0 / 65_536.0),
        (r#"canary_version_buckets{service="shop",version="v2"}"#, 3_277.0),
        (r#"canary_version_connections_total{service="shop",version="stable"}"#, 100.0),
        (
            r#"canary_backend_packets_total{service="shop",version="v2",backend="10.0.2.1:8443"}"#,
            50.0,
        ),
        (
            r#"canary_backend_bytes_total{service="shop",version="v2",backend="10.0.2.1:8443"}"#,
            60_000.0,
        ),
        (
            r#"canary_backend_connections_total{service="shop",version="v2",backend="10.0.2.1:8443"}"#,
            5.0,
        ),
        (
            r#"canary_backend_check_failures_total{service="shop",version="v2",backend="10.0.2.1:8443"}"#,
            7.0,
        ),
        (r#"canary_backend_check_up{service="shop",version="v2",backend="10.0.2.1:8443"}"#, 1.0),
        (
            r#"canary_backend_check_duration_seconds{service="shop",version="v2",backend="10.0.2.1:8443"}"#,
            0.002,
        ),
        (r#"canary_backend_up{service="shop",version="v2",backend="10.0.2.1:8443"}"#, 1.0),
        (
            r#"canary_backend_up{service="shop",version="stable",backend="[2001:db8:1::1]:8443"}"#,
            0.0,
        ),
        (r#"canary_packets_total{verdict="drop",reason="bad_ip_length"}"#, 3.0),
        (r#"canary_map_capacity_entries{map="FLOWS_V4"}"#, 262_144.0),
        (r#"canary_map_used_entries{map="FLOWS_V4"}"#, 10.0),
        (r#"canary_map_memory_bytes{map="FLOWS_V4"}"#, 25_165_824.0),
        (r#"canary_audience_networks{audience="beta"}"#, 2.0),
        (r#"canary_audience_members{audience="beta"}"#, 512.0),
        (r#"canary_audience_member_changes_total{audience="beta",change="expired"}"#, 3.0),
        ("canary_split_change_seconds_count", 1.0),
        ("canary_split_change_seconds_sum", 0.003),
        (r#"canary_split_change_seconds_bucket{le="0.004"}"#, 1.0),
        (r#"canary_split_change_seconds_bucket{le="0.002"}"#, 0.0),
        (r#"canary_split_change_seconds_bucket{le="+Inf"}"#, 1.0),
    ] {
        assert_eq!(page.samples.get(series), Some(&value), "{series}\n{}", answer.body);
    }
}

#[test]
fn every_metric_is_documented_and_no_other() {
    let documented = include_str!("../../../docs/metrics.md");
    let metrics = Metrics::new();
    let page = parse(&metrics.render(&support::status(), Exposition::Prometheus));
    for name in page.types.keys() {
        assert!(name.starts_with("canary_"), "{name}");
        assert!(documented.contains(&format!("| `{name}` |")), "{name} is not documented");
    }
    for row in documented.lines().filter_map(|line| line.strip_prefix("| `canary_")) {
        let name = format!("canary_{}", row.split('`').next().expect("a name"));
        assert!(page.types.contains_key(&name), "{name} does not exist");
    }
}

#[test]
fn names_with_quotes_do_not_break_the_page() {
    let mut status = support::status();
    status.services[0].name = "a\"b\\c\nd".to_owned();
    let metrics = Metrics::new();
    let page = parse(&metrics.render(&status, Exposition::Prometheus));
    assert!(page.samples.contains_key(r#"canary_service_buckets{service="a\"b\\c\nd"}"#));
}

#[test]
fn openmetrics_ends_with_its_mark() {
    let metrics = Metrics::new();
    let page = metrics.render(&support::status(), Exposition::OpenMetrics);
    assert!(page.ends_with("# EOF\n"));
    assert!(page.contains("# TYPE canary_backend_bytes counter\n"));
}

#[test]
fn the_last_bucket_of_handshakes_has_no_end() {
    let mut status = support::status();
    let buckets = [(Some(0.001), 4), (None, 3)];
    status.services[0].versions[1].signals = Some(VersionSignalsStatus {
        handshake_sum_seconds: 0.25,
        handshakes: buckets
            .map(|(upto_seconds, handshakes)| HandshakeBucket { upto_seconds, handshakes })
            .into(),
        ..VersionSignalsStatus::default()
    });
    let page = parse(&Metrics::new().render(&status, Exposition::Prometheus));
    let of = r#"service="shop",version="v2"}"#;
    for (series, value) in [
        (format!("bucket{{le=\"0.001\",{of}"), 4.0),
        (format!("bucket{{le=\"+Inf\",{of}"), 7.0),
        (format!("count{{{of}"), 7.0),
        (format!("sum{{{of}"), 0.25),
    ] {
        let series = format!("canary_handshake_seconds_{series}");
        assert_eq!(page.samples.get(&series), Some(&value), "{series}");
    }
}
