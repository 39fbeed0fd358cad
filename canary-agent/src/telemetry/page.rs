//! The text of a page, family by family, in the form that is asked for.
//!
//! With ten thousand backends a page has a hundred thousand samples. The library makes some twenty
//! writes of each, escapes its labels anew, and knows OpenMetrics alone; here labels are text already,
//! and numbers are written by the crates that the library writes them with. It must not know what
//! is counted.

use super::metrics::Exposition;

/// Labels as they stand between the braces.
#[derive(Clone, Debug, Default)]
pub(super) struct Labels(String);

impl Labels {
    /// One label.
    pub(super) fn one(name: &str, value: &str) -> Self {
        Self::default().with(name, value)
    }

    /// These and one more behind them.
    pub(super) fn with(&self, name: &str, value: &str) -> Self {
        // The comma, the sign, both quotes, and a little for what is escaped.
        let mut text = String::with_capacity(self.0.len() + name.len() + value.len() + 8);
        if !self.0.is_empty() {
            text.push_str(&self.0);
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        let mut rest = value;
        while let Some(at) = rest.find(['\\', '"', '\n']) {
            let (plain, special) = rest.split_at(at);
            text.push_str(plain);
            text.push_str(match special.as_bytes()[0] {
                b'\n' => "\\n",
                b'"' => "\\\"",
                _ => "\\\\",
            });
            rest = &special[1..];
        }
        text.push_str(rest);
        text.push('"');
        Self(text)
    }
}

impl AsRef<str> for Labels {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// A number of a sample.
pub(super) trait Number: Copy {
    fn write(self, text: &mut String);
}

impl Number for u32 {
    fn write(self, text: &mut String) {
        text.push_str(itoa::Buffer::new().format(self));
    }
}

impl Number for u64 {
    fn write(self, text: &mut String) {
        text.push_str(itoa::Buffer::new().format(self));
    }
}

impl Number for f64 {
    fn write(self, text: &mut String) {
        text.push_str(dtoa::Buffer::new().format(self));
    }
}

/// A whole number as the library writes one that has a fraction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Whole(pub(super) u32);

impl Number for Whole {
    fn write(self, text: &mut String) {
        self.0.write(text);
        text.push_str(".0");
    }
}

/// How long something took, of many: bucket by bucket, each by its upper end and without what is
/// in those before it. The last one has no end.
#[derive(Debug)]
pub(super) struct Histogram {
    pub(super) sum: f64,
    pub(super) buckets: Vec<(Option<f64>, u64)>,
}

/// A page on its way.
#[derive(Debug)]
pub(super) struct Page {
    text: String,
    format: Exposition,
}

impl Page {
    /// Goes on behind `text`.
    pub(super) fn new(text: String, format: Exposition) -> Self {
        Self { text, format }
    }

    /// The whole of it.
    pub(super) fn finish(mut self) -> String {
        if self.format == Exposition::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }

    /// A family of counters.
    pub(super) fn counter<L: AsRef<str>>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, u64)>,
    ) {
        let total = format!("{name}_total");
        // In the classic form a counter's family has the name of its samples.
        let family = if self.format == Exposition::Prometheus { &total } else { name };
        self.describe(family, help, "counter");
        self.samples(&total, samples);
    }

    /// A family of gauges.
    pub(super) fn gauge<L: AsRef<str>, N: Number>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, N)>,
    ) {
        self.describe(name, help, "gauge");
        self.samples(name, samples);
    }

    /// A gauge without labels.
    pub(super) fn number(&mut self, name: &str, help: &str, value: f64) {
        self.describe(name, help, "gauge");
        self.text.push_str(name);
        self.value(value);
    }

    /// A family of histograms.
    pub(super) fn histogram(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels, Histogram)>,
    ) {
        self.describe(name, help, "histogram");
        let [sum, count, bucket] =
            ["sum", "count", "bucket"].map(|suffix| format!("{name}_{suffix}"));
        for (labels, Histogram { sum: all, buckets }) in samples {
            self.samples(&sum, [(&labels, all)]);
            self.samples(&count, [(&labels, buckets.iter().map(|(_, count)| count).sum::<u64>())]);
            let mut before = 0;
            self.samples(
                &bucket,
                buckets.into_iter().map(|(upto, count)| {
                    before += count;
                    let mut within = String::from("le=\"");
                    match upto {
                        Some(upto) => upto.write(&mut within),
                        None => within.push_str("+Inf"),
                    }
                    within.push('"');
                    if !labels.0.is_empty() {
                        within.push(',');
                        within.push_str(&labels.0);
                    }
                    (within, before)
                }),
            );
        }
    }

    fn describe(&mut self, family: &str, help: &str, kind: &str) {
        for part in ["# HELP ", family, " ", help, "\n# TYPE ", family, " ", kind, "\n"] {
            self.text.push_str(part);
        }
    }

    fn samples<L: AsRef<str>, N: Number>(
        &mut self,
        name: &str,
        samples: impl IntoIterator<Item = (L, N)>,
    ) {
        let head = format!("{name}{{");
        for (labels, value) in samples {
            self.text.push_str(&head);
            self.text.push_str(labels.as_ref());
            self.text.push('}');
            self.value(value);
        }
    }

    fn value(&mut self, value: impl Number) {
        self.text.push(' ');
        value.write(&mut self.text);
        self.text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use prometheus_client::{
        collector::Collector,
        encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text},
        metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
        registry::Registry,
    };
    use proptest::prelude::*;

    use super::*;

    /// A world in which every kind of family and number is.
    #[derive(Clone, Debug)]
    struct World {
        /// Of three labels each.
        counted: Vec<([String; 3], u64)>,
        fractions: Vec<(String, f64)>,
        wholes: Vec<u32>,
        number: f64,
        took: Vec<(f64, u64)>,
        sum: f64,
    }

    const NAMES: [&str; 3] = ["service", "version", "backend"];

    impl World {
        fn labels(values: &[String; 3]) -> [(&'static str, &str); 3] {
            std::array::from_fn(|at| (NAMES[at], &*values[at]))
        }

        /// As the library writes it.
        fn by_library(&self) -> String {
            let mut registry = Registry::default();
            registry.register_collector(Box::new(self.clone()));
            let mut text = String::new();
            text::encode(&mut text, &registry).expect("a string takes everything");
            text
        }

        fn page(&self, format: Exposition) -> String {
            let mut page = Page::new(String::new(), format);
            page.counter(
                "a_counts",
                "What is counted.",
                self.counted.iter().map(|(values, count)| {
                    let labels = Self::labels(values);
                    let none = Labels::default();
                    (labels.iter().fold(none, |all, (name, value)| all.with(name, value)), *count)
                }),
            );
            page.gauge(
                "a_fraction_ratio",
                "A part.",
                self.fractions.iter().map(|(of, part)| (Labels::one("of", of), *part)),
            );
            page.gauge("a_whole", "One", self.wholes.iter().map(|whole| ("", *whole)));
            page.gauge("a_float", "One", self.wholes.iter().map(|whole| ("", Whole(*whole))));
            page.number("a_number", "One alone", self.number);
            let buckets: Vec<_> =
                self.took.iter().map(|(upto, count)| (Some(*upto), *count)).collect();
            let of = |labels| {
                let last = (None, 7);
                let buckets = buckets.iter().copied().chain([last]).collect();
                (labels, Histogram { sum: self.sum, buckets })
            };
            page.histogram(
                "a_time_seconds",
                "How long.",
                [of(Labels::default()), of(Labels::one("of", "a"))],
            );
            page.finish()
        }
    }

    impl Collector for World {
        fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
            let mut family = encoder.encode_descriptor(
                "a_counts",
                "What is counted.",
                None,
                MetricType::Counter,
            )?;
            for (values, count) in &self.counted {
                let labels = Self::labels(values);
                ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
            }
            let mut family = encoder.encode_descriptor(
                "a_fraction_ratio",
                "A part.",
                None,
                MetricType::Gauge,
            )?;
            for (of, part) in &self.fractions {
                ConstGauge::new(*part).encode(family.encode_family(&[("of", of)])?)?;
            }
            let none: &[(&str, &str)] = &[];
            let mut family =
                encoder.encode_descriptor("a_whole", "One", None, MetricType::Gauge)?;
            for whole in &self.wholes {
                ConstGauge::new(*whole).encode(family.encode_family(&none)?)?;
            }
            let mut family =
                encoder.encode_descriptor("a_float", "One", None, MetricType::Gauge)?;
            for whole in &self.wholes {
                ConstGauge::new(f64::from(*whole)).encode(family.encode_family(&none)?)?;
            }
            let family =
                encoder.encode_descriptor("a_number", "One alone", None, MetricType::Gauge)?;
            ConstGauge::new(self.number).encode(family)?;
            let buckets: Vec<_> = self.took.iter().copied().chain([(f64::INFINITY, 7)]).collect();
            let all = buckets.iter().map(|(_, count)| count).sum();
            let mut family = encoder.encode_descriptor(
                "a_time_seconds",
                "How long.",
                None,
                MetricType::Histogram,
            )?;
            family
                .encode_family(&none)?
                .encode_histogram::<NoLabelSet>(self.sum, all, &buckets, None)?;
            family
                .encode_family(&[("of", "a")])?
                .encode_histogram::<NoLabelSet>(self.sum, all, &buckets, None)
        }
    }

    fn worlds() -> impl Strategy<Value = World> {
        let value = || prop_oneof!["[a-z0-9.:]{0,12}", "[\"\\\\\n\r a{},=ü]{0,6}", any::<String>()];
        let number =
            || prop_oneof![any::<f64>(), 0.0..1.0, (0_u64..1 << 60).prop_map(|n| n as f64)];
        (
            prop::collection::vec(([value(), value(), value()], any::<u64>()), 0..4),
            prop::collection::vec((value(), number()), 0..4),
            prop::collection::vec(any::<u32>(), 0..4),
            number(),
            prop::collection::vec((number(), 0..u64::from(u32::MAX)), 0..4),
            number(),
        )
            .prop_map(|(counted, fractions, wholes, number, took, sum)| World {
                counted,
                fractions,
                wholes,
                number,
                took: took.into_iter().filter(|(upto, _)| upto.is_finite()).collect(),
                sum,
            })
    }

    proptest! {
        #[test]
        fn the_text_is_the_librarys(world in worlds()) {
            prop_assert_eq!(world.page(Exposition::OpenMetrics), world.by_library());
        }
    }

    #[test]
    fn the_classic_form_names_counters_by_their_samples() {
        let page = |format| {
            let mut page = Page::new("# before\n".to_owned(), format);
            page.counter("a_b", "Of bees.", [(Labels::one("x", "1"), 4)]);
            page.number("c", "Sea.", 1.5);
            page.finish()
        };
        assert_eq!(
            page(Exposition::Prometheus),
            "# before\n# HELP a_b_total Of bees.\n# TYPE a_b_total counter\na_b_total{x=\"1\"} 4\n\
             # HELP c Sea.\n# TYPE c gauge\nc 1.5\n"
        );
        assert_eq!(
            page(Exposition::OpenMetrics),
            "# before\n# HELP a_b Of bees.\n# TYPE a_b counter\na_b_total{x=\"1\"} 4\n\
             # HELP c Sea.\n# TYPE c gauge\nc 1.5\n# EOF\n"
        );
    }

    #[test]
    fn values_can_not_end_their_label() {
        let labels = Labels::one("a", "\"\\\n\r}ü").with("b", "");
        assert_eq!(labels.as_ref(), "a=\"\\\"\\\\\\n\r}ü\",b=\"\"");
    }
}
