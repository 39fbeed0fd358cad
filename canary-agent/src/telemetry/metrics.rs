//! The metrics page.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::text,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::{collect::collect, page::Page};
use crate::api::model::Status;

/// A form of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// Prometheus text, version 0.0.4: for whoever asks for nothing else.
    Prometheus,
    /// OpenMetrics text, version 1.0.0.
    OpenMetrics,
}

impl Exposition {
    /// The form that fits a request's `Accept` headers.
    pub fn for_accept<'a>(accept: impl IntoIterator<Item = &'a str>) -> Self {
        let open = accept.into_iter().flat_map(|header| header.split(',')).any(|range| {
            let mut parts = range.split(';').map(str::trim);
            parts
                .next()
                .is_some_and(|kind| kind.eq_ignore_ascii_case("application/openmetrics-text"))
                && parts.all(|part| part != "q=0")
        });
        if open { Self::OpenMetrics } else { Self::Prometheus }
    }

    /// The `Content-Type` of the form.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// What the process counts itself, and the way to the page. Cheap to clone.
///
/// ```
/// use std::time::Duration;
/// use canary_agent::{api::model::Status, telemetry::{Exposition, Metrics}};
///
/// let metrics = Metrics::new();
/// metrics.split_applied(Duration::from_millis(3));
/// let page = metrics.render(&Status::default(), Exposition::Prometheus);
/// assert!(page.contains("canary_split_change_seconds_count 1"));
/// ```
#[derive(Clone, Debug)]
pub struct Metrics {
    split_change: Histogram,
    rollback: Histogram,
    reloads: Family<[(&'static str, &'static str); 1], Counter>,
    reload_success: Gauge,
    /// Of the last page.
    length: Arc<AtomicUsize>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new() -> Self {
        // 0.25 ms to 4 s: the promise is a second, most take a few milliseconds.
        let split_change = Histogram::new(exponential_buckets(0.000_25, 2.0, 15));
        let rollback = Histogram::new(exponential_buckets(0.000_25, 2.0, 15));
        let reloads = Family::default();
        // Both are there from the beginning, so that a rate can be made of them.
        for result in [SUCCESS, FAILURE] {
            drop(reloads.get_or_create(&result));
        }
        Self {
            split_change,
            rollback,
            reloads,
            reload_success: Gauge::default(),
            length: Arc::default(),
        }
    }

    /// Counts a split change that was in force `took` after its request came.
    pub fn split_applied(&self, took: Duration) {
        self.split_change.observe(took.as_secs_f64());
    }

    /// Counts a share that a rollout has taken back, in force `took` after the verdict.
    pub fn rolled_back(&self, took: Duration) {
        self.rollback.observe(took.as_secs_f64());
    }

    /// The configuration was read at the start, which is no reload but succeeds like one.
    pub fn started(&self) {
        self.reload_success.set(now_seconds());
    }

    /// Counts a reload that was made, or refused.
    pub fn reloaded(&self, success: bool) {
        self.reloads.get_or_create(if success { &SUCCESS } else { &FAILURE }).inc();
        if success {
            self.reload_success.set(now_seconds());
        }
    }

    /// The page.
    pub fn render(&self, status: &Status, format: Exposition) -> String {
        let mut registry = Registry::default();
        registry.register(
            "canary_split_change_seconds",
            "Time from the request for a split to its being in force",
            self.split_change.clone(),
        );
        registry.register(
            "canary_rollout_rollback_seconds",
            "Time from a rollout's verdict, or an operator's word, to its share being taken back",
            self.rollback.clone(),
        );
        registry.register(
            "canary_reloads",
            "Reloads of the configuration that were made, or refused",
            self.reloads.clone(),
        );
        registry.register(
            "canary_reload_last_success_timestamp_seconds",
            "When the configuration was last read and taken over, in seconds since 1970",
            self.reload_success.clone(),
        );
        let mut own = String::new();
        // Writing to a string can't fail.
        if text::encode_registry(&mut own, &registry).is_err() {
            tracing::error!("the metrics can't be written: this is a bug");
        }
        if format == Exposition::Prometheus {
            own = classic(&own);
        }
        // The next page is about as long as the last one.
        let last = self.length.load(Ordering::Relaxed);
        own.reserve(last + last / 16);
        let mut page = Page::new(own, format);
        collect(&mut page, status);
        let page = page.finish();
        self.length.store(page.len(), Ordering::Relaxed);
        page
    }
}

const SUCCESS: [(&str, &str); 1] = [("result", "success")];
const FAILURE: [(&str, &str); 1] = [("result", "failure")];

fn now_seconds() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

/// OpenMetrics as Prometheus text 0.0.4: there a counter's family has the name of
/// its samples, `_total` included.
fn classic(page: &str) -> String {
    let mut classic = String::with_capacity(page.len() + page.len() / 16);
    let mut help = None;
    for line in page.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            help = text.split_once(' ');
            continue;
        }
        if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|text| text.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, help)) = help.take() {
                classic.push_str(&format!("# HELP {name}{suffix} {help}\n"));
            }
            classic.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else {
            classic.push_str(line);
            classic.push('\n');
        }
    }
    classic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_for_those_who_accept_it() {
        use Exposition::{OpenMetrics, Prometheus};
        for (accept, format) in [
            (vec![], Prometheus),
            (vec!["*/*"], Prometheus),
            (vec!["text/plain"], Prometheus),
            (
                vec!["application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4"],
                OpenMetrics,
            ),
            (vec!["text/plain", "application/openmetrics-text"], OpenMetrics),
            (vec!["application/openmetrics-text;q=0"], Prometheus),
        ] {
            assert_eq!(Exposition::for_accept(accept.clone()), format, "{accept:?}");
        }
    }

    #[test]
    fn the_classic_form_names_counters_by_their_samples() {
        let open = "# HELP a_b Of bees.\n# TYPE a_b counter\na_b_total{x=\"1\"} 4\n\
                    # HELP c Sea.\n# TYPE c gauge\nc 1\n";
        let plain = "# HELP a_b_total Of bees.\n# TYPE a_b_total counter\na_b_total{x=\"1\"} 4\n\
                     # HELP c Sea.\n# TYPE c gauge\nc 1\n";
        assert_eq!(classic(open), plain);
    }
}
