//! What a configuration names that is not in it: the host's users and groups, files
//! of certificates, and the certificates that the host trusts.

use std::{fs, io, path::Path};

use nix::unistd::{Group, User};
use tokio_rustls::rustls::pki_types::CertificateDer;

/// Finds what a configuration names outside of itself.
pub trait Outside {
    /// The number of a user; `None` if there is no such user.
    fn uid(&self, name: &str) -> Option<u32>;
    /// The number of a group; `None` if there is no such group.
    fn gid(&self, name: &str) -> Option<u32>;
    /// The content of a file.
    ///
    /// # Errors
    /// It can't be read.
    fn file(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// The authorities that the host trusts; none if it has none that can be read.
    fn authorities(&self) -> Vec<CertificateDer<'static>>;
}

/// This host: its accounts from wherever its name service has them, its files, and the
/// certificates of its distribution (or of `SSL_CERT_FILE` and `SSL_CERT_DIR`).
#[derive(Clone, Copy, Debug)]
pub struct ThisHost;

impl Outside for ThisHost {
    fn uid(&self, name: &str) -> Option<u32> {
        let user = User::from_name(name).ok().flatten()?;
        Some(user.uid.as_raw())
    }

    fn gid(&self, name: &str) -> Option<u32> {
        let group = Group::from_name(name).ok().flatten()?;
        Some(group.gid.as_raw())
    }

    fn file(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn authorities(&self) -> Vec<CertificateDer<'static>> {
        rustls_native_certs::load_native_certs().certs
    }
}

/// Nothing at all: for texts that are checked apart from any host.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Outside for Nothing {
    fn uid(&self, _name: &str) -> Option<u32> {
        None
    }

    fn gid(&self, _name: &str) -> Option<u32> {
        None
    }

    fn file(&self, _path: &Path) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn authorities(&self) -> Vec<CertificateDer<'static>> {
        Vec::new()
    }
}
