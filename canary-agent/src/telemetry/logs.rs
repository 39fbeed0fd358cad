//! Where the log goes, and how it looks.

use std::{
    io::{self, IsTerminal},
    sync::OnceLock,
    time::{Duration, Instant},
};

use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    reload::{self, Handle},
    util::SubscriberInitExt,
};

use super::{
    journal,
    repeats::{Repeats, WINDOW, shortened},
};

/// What of a process's log can be changed while it runs.
struct Log {
    filter: Handle<EnvFilter, Registry>,
    repeats: Repeats,
    /// `RUST_LOG` is set, and holds.
    by_environment: bool,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Sets up the log of this process: to stderr, filtered by `RUST_LOG` (`info`
/// when it is not set or wrong). Where that is systemd's journal, which has times of its
/// own, lines have none, and say their priority. A second call changes nothing.
pub fn init_logs(format: LogFormat) {
    let text = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let by_environment = text.is_some();
    let (filter, wrong) = filter(text);
    let journal = journal::is_stderr();
    let look = Look {
        format,
        times: !journal,
        colours: io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    let (filter, handle) = reload::Layer::new(filter);
    let repeats = Repeats::default();
    let set = if journal {
        log(look, filter, repeats.clone(), journal::Prioritised(io::stderr)).try_init()
    } else {
        log(look, filter, repeats.clone(), io::stderr).try_init()
    };
    if set.is_ok() {
        // Nobody was first: setting the subscriber was.
        let _ = LOG.set(Log { filter: handle, repeats, by_environment });
        if let Some(wrong) = wrong {
            tracing::warn!("RUST_LOG is wrong, logging at info: {wrong}");
        }
    }
}

/// Whether `filter` says what to log, in the notation of `RUST_LOG`.
///
/// # Errors
/// What is wrong with it.
pub fn check_log_filter(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter).map(drop).map_err(|error| error.to_string())
}

/// Logs what `filter` says from now on, unless `RUST_LOG` is set. Returns whether it does.
pub fn set_log_filter(filter: &str) -> bool {
    let Some(log) = LOG.get().filter(|log| !log.by_environment) else {
        return false;
    };
    EnvFilter::try_new(filter).is_ok_and(|filter| log.filter.reload(filter).is_ok())
}

/// Tells from time to time which lines were repeated and left out, until it is dropped.
pub async fn tell_repeats() {
    let Some(Log { repeats, .. }) = LOG.get() else {
        return;
    };
    loop {
        tokio::time::sleep(WINDOW / 2).await;
        for (line, times) in repeats.take(Instant::now()) {
            let within = Duration::from_secs(WINDOW.as_secs());
            tracing::info!(times, ?within, "said again and left out: {}", shortened(&line));
        }
    }
}

/// What `RUST_LOG` says, and what is wrong with it.
fn filter(text: Option<String>) -> (EnvFilter, Option<String>) {
    let usual = || EnvFilter::new("info");
    match text.filter(|text| !text.is_empty()).map(EnvFilter::try_new) {
        None => (usual(), None),
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (usual(), Some(error.to_string())),
    }
}

/// How lines look.
#[derive(Clone, Copy)]
struct Look {
    format: LogFormat,
    times: bool,
    colours: bool,
}

fn log<W>(
    look: Look,
    filter: impl Layer<Registry> + Send + Sync,
    repeats: Repeats,
    writer: W,
) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = fmt::layer().with_writer(writer).with_ansi(look.colours);
    let lines = match (look.format, look.times) {
        (LogFormat::Text, true) => lines.with_filter(repeats).boxed(),
        (LogFormat::Text, false) => lines.without_time().with_filter(repeats).boxed(),
        (LogFormat::Json, true) => lines.json().flatten_event(true).with_filter(repeats).boxed(),
        (LogFormat::Json, false) => {
            lines.json().flatten_event(true).without_time().with_filter(repeats).boxed()
        }
    };
    Box::new(tracing_subscriber::registry().with(filter).with(lines))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            buffer.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn line(format: LogFormat, times: bool) -> String {
        let look = Look { format, times, colours: false };
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let (filter, handle) = reload::Layer::new(EnvFilter::new("warn"));
        let log = log(look, filter, Repeats::default(), move || writer.clone());
        tracing::subscriber::with_default(log, || {
            tracing::info!("not asked for yet");
            handle.reload(EnvFilter::new("info")).expect("the log is there");
            tracing::info!(service = "shop", "split applied");
            tracing::debug!("not asked for");
        });
        let bytes = buffer.0.lock().expect("not poisoned").clone();
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn lines_are_text_or_json_with_or_without_times() {
        let text = line(LogFormat::Text, false);
        assert!(text.trim_start().starts_with("INFO "), "{text:?}");
        assert!(text.ends_with("split applied service=\"shop\"\n"), "{text:?}");
        assert!(line(LogFormat::Text, true).starts_with("20"), "a year");

        let read = |times| -> serde_json::Value {
            serde_json::from_str(&line(LogFormat::Json, times)).expect("one object")
        };
        assert_eq!(read(true)["service"], "shop");
        assert!(read(true)["timestamp"].is_string());
        assert!(read(false).get("timestamp").is_none());
    }

    #[test]
    fn a_warning_that_is_repeated_is_left_out() {
        let look = Look { format: LogFormat::Text, times: false, colours: false };
        let (buffer, repeats) = (Buffer::default(), Repeats::default());
        let writer = buffer.clone();
        let log = log(look, EnvFilter::new("info"), repeats.clone(), move || writer.clone());
        tracing::subscriber::with_default(log, || {
            for n in 0..6 {
                tracing::warn!(map = "TABLE", "the kernel refuses");
                tracing::warn!(n = n / 3, "another");
                tracing::info!("as often as it likes");
            }
        });
        let bytes = buffer.0.lock().expect("not poisoned").clone();
        let text = String::from_utf8(bytes).expect("text");
        let count = |part: &str| text.matches(part).count();
        assert_eq!([count("refuses"), count("another"), count("likes")], [1, 2, 6], "{text}");
        let mut told = repeats.take(Instant::now() + WINDOW);
        told.sort();
        let line = |(line, times): &(String, u64)| (shortened(line).to_owned(), *times);
        let told: Vec<_> = told.iter().map(line).collect();
        assert_eq!(told[2], ("the kernel refuses map=\"TABLE\"".to_owned(), 5), "{told:?}");
        assert_eq!(told.iter().map(|(_, times)| times).sum::<u64>(), 9);
    }

    #[test]
    fn a_wrong_filter_is_told_and_not_used() {
        assert!(filter(None).1.is_none());
        assert!(filter(Some(String::new())).1.is_none());
        assert!(filter(Some("canary_agent=debug".to_owned())).1.is_none());
        let (used, wrong) = filter(Some("info,shop=[loud".to_owned()));
        assert!(wrong.is_some());
        assert_eq!(used.to_string(), "info");
    }
}
