//! The kernel that runs here: whether it is recent enough, and what it said when it
//! refused a map or a program.

use std::{fmt, io};

use aya::{BtfError, EbpfError, maps::MapError, programs::ProgramError};
use nix::sys::utsname::uname;

use super::{Error, causes};

/// The oldest release that the programs are made for: atomic replacement of a
/// program on a link, bounded loops and `bpf_loop`, and a verifier that follows them.
pub(super) const OLDEST: (u32, u32) = (6, 1);

/// Lines of the verifier's log that are shown: the reason comes last.
const LOG_LINES: usize = 8;
/// Characters of such a line that are shown.
const LOG_CHARS: usize = 200;

/// What `uname -r` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release(String);

impl Release {
    /// Of the running kernel.
    pub(super) fn running() -> Self {
        let found = uname().map(|u| u.release().to_string_lossy().into_owned());
        Self(found.unwrap_or_else(|_| "of unknown release".to_owned()))
    }

    /// Major and minor number, where it begins with them.
    fn number(&self) -> Option<(u32, u32)> {
        let mut parts = self.0.split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?;
        let digits = minor.bytes().take_while(u8::is_ascii_digit).count();
        Some((major, minor[..digits].parse().ok()?))
    }

    /// Refuses a kernel that is too old. One that does not say how old it is may try.
    pub(super) fn recent_enough(self) -> Result<(), Error> {
        match self.number() {
            Some(number) if number < OLDEST => Err(Error::OldKernel(self)),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the kernel did not take, and what it said.
#[derive(Debug)]
pub struct Refused {
    /// The map or the program.
    what: String,
    /// The error of the system call.
    errno: i32,
    /// The end of the verifier's log; empty where it had nothing to say.
    log: Vec<String>,
    kernel: Release,
}

impl Refused {
    fn new(what: impl Into<String>, error: &io::Error, log: &str) -> Self {
        let lines: Vec<&str> = log.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
        Self {
            what: what.into(),
            errno: error.raw_os_error().unwrap_or_default(),
            log: tail.iter().map(|line| line.chars().take(LOG_CHARS).collect()).collect(),
            kernel: Release::running(),
        }
    }

    /// Whether the caller lacks rights. The verifier says `EACCES` too, of a program
    /// that reads where it must not, but then it has a log.
    fn not_permitted(&self) -> bool {
        matches!(self.errno, libc::EPERM | libc::EACCES) && self.log.is_empty()
    }

    /// What can be done about it.
    pub(super) fn help(&self) -> String {
        match self.errno {
            libc::ENOMEM | libc::E2BIG => {
                "lower the sizes in `agent.capacity`, or give the host (or the agent's control group) \
                 more memory"
                    .to_owned()
            }
            _ => format!(
                "Linux {}.{} or newer with CONFIG_BPF_SYSCALL is needed; if this is one, please report \
                 all of this message",
                OLDEST.0, OLDEST.1
            ),
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, errno, log, kernel } = self;
        let error = io::Error::from_raw_os_error(*errno);
        write!(f, "the kernel (Linux {kernel}) refused {what}: {error}")?;
        if !log.is_empty() {
            write!(f, "; its verifier's last words:\n    {}", log.join("\n    "))?;
        }
        Ok(())
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused.not_permitted() {
            true => Self::NotPermitted(refused.to_string()),
            false => Self::Refused(Box::new(refused)),
        }
    }
}

impl From<EbpfError> for Error {
    fn from(error: EbpfError) -> Self {
        match error {
            EbpfError::MapError(error) => error.into(),
            EbpfError::ProgramError(error) => error.into(),
            EbpfError::BtfError(BtfError::LoadError { io_error, verifier_log }) => {
                let what = "the programs' type information (BTF)";
                Refused::new(what, &io_error, &verifier_log.to_string()).into()
            }
            error => Self::Load(Box::new(error)),
        }
    }
}

impl From<ProgramError> for Error {
    fn from(error: ProgramError) -> Self {
        match error {
            ProgramError::LoadError { io_error, verifier_log } => {
                Refused::new("program `ingress`", &io_error, &verifier_log.to_string()).into()
            }
            ProgramError::MapError(error) => error.into(),
            error if not_permitted(&error) => Self::NotPermitted(causes(&error)),
            error => Self::Program(Box::new(error)),
        }
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        match error {
            MapError::CreateError { name, io_error } => {
                Refused::new(format!("map `{name}`"), &io_error, "").into()
            }
            error if not_permitted(&error) => Self::NotPermitted(causes(&error)),
            error => Self::Map(Box::new(error)),
        }
    }
}

/// Whether an error goes back to EPERM or EACCES.
pub(super) fn not_permitted(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::PermissionDenied
        {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(text: &str) -> Release {
        Release(text.to_owned())
    }

    #[test]
    fn releases_are_compared_by_number() {
        for old in ["5.10.0-32-cloud-amd64", "6.0.19", "6.0-rc7", "2.6.60.44", "5.15"] {
            let error = release(old).recent_enough().expect_err(old);
            let said = error.to_string();
            assert!(said.contains(old) && said.contains("6.1"), "{said}");
        }
        for recent in ["6.1.0-56-cloud-amd64", "6.1-rc1", "6.18.44", "7.0", "10.2.1", "odd", ""] {
            release(recent).recent_enough().expect(recent);
        }
    }

    #[test]
    fn a_program_that_the_verifier_refused_is_no_matter_of_rights() {
        let log: String = (0..100).map(|n| format!("{n}: (b7) r0 = {n}\n")).collect();
        let denied = io::Error::from_raw_os_error(libc::EACCES);
        let error: Error = Refused::new("program `ingress`", &denied, &log).into();
        assert!(!error.not_permitted(), "{error}");
        let said = error.to_string();
        assert!(said.contains("`ingress`") && said.contains("os error 13"), "{said}");
        assert!(said.contains("99: (b7)") && !said.contains("91: (b7)"), "{said}");
        assert!(said.contains(&Release::running().0), "{said}");
        let error: Error = Refused::new("program `ingress`", &denied, "").into();
        assert!(error.not_permitted(), "{error}");
    }

    #[test]
    fn a_map_that_does_not_fit_says_what_to_lower() {
        let full = io::Error::from_raw_os_error(libc::ENOMEM);
        let error: Error =
            MapError::CreateError { name: "FLOWS_V4".to_owned(), io_error: full }.into();
        assert!(error.to_string().contains("map `FLOWS_V4`"), "{error}");
        assert!(error.help().is_some_and(|help| help.contains("agent.capacity")), "{error}");
    }
}
