//! How a command ends when it does not end well.

use std::io;

use crate::{
    api::model::{ErrorBody, ErrorDetail},
    config,
    daemon::Refusal,
};

/// Exit codes, as the contract numbers them.
pub(super) mod exit {
    /// Done.
    pub(in crate::cli) const DONE: u8 = 0;
    /// It was tried and did not work.
    pub(in crate::cli) const FAILED: u8 = 1;
    /// It was asked wrongly.
    pub(in crate::cli) const USAGE: u8 = 2;
    /// A rollout was aborted.
    pub(in crate::cli) const ABORTED: u8 = 3;
    /// A rollout needs an operator.
    pub(in crate::cli) const HELD: u8 = 4;
    /// The daemon can't be reached.
    pub(in crate::cli) const UNREACHABLE: u8 = 5;
    /// Who asks may not.
    pub(in crate::cli) const NOT_PERMITTED: u8 = 77;
    /// The configuration is wrong.
    pub(in crate::cli) const BAD_CONFIG: u8 = 78;
}

/// Why a command has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Something that people and programs are told.
    #[error("{}", .0.message)]
    Told(Box<ErrorDetail>),
    /// Whoever read the output has gone; nobody needs to be told.
    #[error("the output is closed")]
    OutputClosed,
}

impl Failure {
    /// A failure with its word for programs and its sentence for people.
    pub(super) fn new(code: &str, exit_code: u8, message: impl Into<String>) -> Self {
        Self::Told(Box::new(ErrorDetail {
            code: code.to_owned(),
            message: message.into(),
            help: None,
            exit_code,
            diagnostics: Vec::new(),
        }))
    }

    /// The same with the next step.
    pub(super) fn help(self, help: impl Into<String>) -> Self {
        match self {
            Self::Told(mut detail) => {
                detail.help = Some(help.into());
                Self::Told(detail)
            }
            Self::OutputClosed => self,
        }
    }

    /// Whether nobody has answered who could have.
    pub(super) fn is_silence(&self) -> bool {
        self.is_late() || self.is(&["unreachable", "busy", "stopping"])
    }

    /// Whether somebody may still answer.
    pub(super) fn is_late(&self) -> bool {
        self.is(&["timeout"])
    }

    fn is(&self, codes: &[&str]) -> bool {
        matches!(self, Self::Told(detail) if codes.contains(&detail.code.as_str()))
    }

    /// The code the process ends with. A reader that has seen enough is no
    /// failure of what was done.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            // An agent that names 0 for an error is wrong about it.
            Self::Told(detail) => detail.exit_code.max(exit::FAILED),
            Self::OutputClosed => exit::DONE,
        }
    }

    /// As JSON, one line.
    pub(super) fn json(&self) -> Option<String> {
        match self {
            Self::Told(detail) => {
                let error = (**detail).clone();
                serde_json::to_string(&ErrorBody { error }).ok()
            }
            Self::OutputClosed => None,
        }
    }

    /// For people.
    pub(super) fn text(&self) -> Option<String> {
        match self {
            Self::Told(detail) if !detail.diagnostics.is_empty() => {
                Some(config::render(&detail.diagnostics).trim_end().to_owned())
            }
            Self::Told(detail) => {
                let help = detail.help.as_ref();
                let help = help.map_or_else(String::new, |help| format!("\n  help: {help}"));
                Some(format!("error: {}{help}", detail.message))
            }
            Self::OutputClosed => None,
        }
    }
}

impl From<ErrorDetail> for Failure {
    fn from(detail: ErrorDetail) -> Self {
        Self::Told(Box::new(detail))
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let Refusal { code, message, help, exit_code } = refusal;
        let failure = Self::new(code, exit_code, message);
        match help {
            Some(help) => failure.help(help),
            None => failure,
        }
    }
}

/// A [`Refusal`] in it keeps its word and its exit code; anything else has failed.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Refusal>() {
            Ok(refusal) => refusal.into(),
            Err(error) => Self::new("failed", exit::FAILED, format!("{error:#}")),
        }
    }
}

/// From writing the output.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::OutputClosed;
        }
        Self::new("output", exit::FAILED, format!("can't write the output: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_its_exit_code_through_anyhow() {
        let refusal = Refusal {
            code: "in_use",
            message: "eth0 has another program".to_owned(),
            help: Some("--replace takes its place".to_owned()),
            exit_code: 1,
        };
        let failure = Failure::from(anyhow::Error::new(refusal.clone()));
        assert_eq!(
            failure.text().as_deref(),
            Some("error: eth0 has another program\n  help: --replace takes its place")
        );
        let failure = Failure::from(anyhow::Error::new(refusal).context("at start"));
        assert_eq!(failure.exit_code(), 1);
        let failure = Failure::from(anyhow::anyhow!("disk").context("at start"));
        assert_eq!(failure.text().as_deref(), Some("error: at start: disk"));
    }

    #[test]
    fn a_closed_output_is_no_failure_and_a_full_disk_is() {
        let closed = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((closed.exit_code(), closed.text()), (exit::DONE, None));
        let full = Failure::from(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(full.exit_code(), exit::FAILED);
    }
}
