//! Where the log goes, and how it looks.

use std::io::{self, IsTerminal};

use tracing::Subscriber;
use tracing_subscriber::{EnvFilter, fmt::MakeWriter, util::SubscriberInitExt};

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
/// when it is not set or wrong), without timestamps under systemd, whose journal
/// has its own (`JOURNAL_STREAM` is set). A second call changes nothing.
pub fn init_logs(format: LogFormat) {
    let (filter, wrong) = filter(std::env::var("RUST_LOG").ok());
    let look = Look {
        format,
        times: std::env::var_os("JOURNAL_STREAM").is_none(),
        colours: io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    let set = log(look, filter, io::stderr).try_init();
    if let (Ok(()), Some(wrong)) = (set, wrong) {
        tracing::warn!("RUST_LOG is wrong, logging at info: {wrong}");
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

fn log<W>(look: Look, filter: EnvFilter, writer: W) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(look.colours);
    match (look.format, look.times) {
        (LogFormat::Text, true) => Box::new(log.finish()),
        (LogFormat::Text, false) => Box::new(log.without_time().finish()),
        (LogFormat::Json, true) => Box::new(log.json().flatten_event(true).finish()),
        (LogFormat::Json, false) => {
            Box::new(log.json().flatten_event(true).without_time().finish())
        }
    }
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
        let log = log(look, EnvFilter::new("info"), move || writer.clone());
        tracing::subscriber::with_default(log, || {
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
    fn a_wrong_filter_is_told_and_not_used() {
        assert!(filter(None).1.is_none());
        assert!(filter(Some(String::new())).1.is_none());
        assert!(filter(Some("canary_agent=debug".to_owned())).1.is_none());
        let (used, wrong) = filter(Some("info,shop=[loud".to_owned()));
        assert!(wrong.is_some());
        assert_eq!(used.to_string(), "info");
    }
}
