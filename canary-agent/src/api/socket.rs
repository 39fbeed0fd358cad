//! The control socket's file: made, guarded, removed.
//!
//! One agent owns the path at a time. A lock file beside the socket says so even
//! when two agents start in the same instant; a socket that nobody listens on is
//! what a dead agent left, and is replaced. Must not know of HTTP.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
            net::UnixListener as StdListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen,
            setsockopt, socket, sockopt::PassCred,
        },
        stat::{Mode, fchmod},
    },
};
use tokio::net::{UnixListener, UnixStream};

/// Owner and group may connect, nobody else.
const SOCKET_MODE: u32 = 0o660;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 256;

/// Why a control socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there, or holds the lock.
    #[error("another agent is listening on {}", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has that name; it is left alone.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// A path that does not fit a socket address.
    #[error("{} is too long for a socket: at most 107 bytes", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// The file system or the kernel refused.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A control socket that listens. Dropping it removes its file.
///
/// ```
/// use canary_agent::api::{ControlSocket, SocketError};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("agent.sock");
/// # tokio::runtime::Runtime::new()?.block_on(async {
/// let socket = ControlSocket::bind(&path)?;
/// assert!(matches!(ControlSocket::bind(&path), Err(SocketError::InUse { .. })));
/// drop(socket);
/// assert!(!path.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that only this socket's own file is removed.
    file: (u64, u64),
    _lock: File,
}

impl ControlSocket {
    /// Makes the socket and listens on it, mode 0660; its directory is made with
    /// 0755 where it is missing. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`SocketError::InUse`] when another agent listens there; what stands at
    /// the path and is no socket is left alone.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |what, source| SocketError::Io { what, path: path.to_owned(), source };
        let address =
            UnixAddr::new(path).map_err(|_| SocketError::TooLong { path: path.to_owned() })?;
        if let Some(parent) = path.parent() {
            make_directory(parent)?;
        }
        let lock = lock(path)?;
        clear(path, &address)?;

        let descriptor = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .map_err(|errno| failed("can't make the socket", errno.into()))?;
        // Each connection inherits it: who writes is told with what is written.
        setsockopt(&descriptor, PassCred, &true)
            .map_err(|errno| failed("can't ask for the senders on", errno.into()))?;
        // The mode of the descriptor is that of the file that `bind` makes
        // (unix(7), less the umask): nobody else can connect at any moment.
        let mode = Mode::from_bits_truncate(SOCKET_MODE);
        fchmod(&descriptor, mode).map_err(|errno| failed("can't set the mode of", errno.into()))?;
        bind(descriptor.as_raw_fd(), &address)
            .map_err(|errno| failed("can't bind", errno.into()))?;
        // A umask of 077 has taken the group's part away.
        fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))
            .map_err(|source| failed("can't set the mode of", source))?;
        let file = identity(path).map_err(|source| failed("can't read", source))?;
        let backlog = Backlog::new(BACKLOG).unwrap_or(Backlog::MAXCONN);
        listen(&descriptor, backlog).map_err(|errno| failed("can't listen on", errno.into()))?;
        let listener = UnixListener::from_std(StdListener::from(descriptor))
            .map_err(|source| failed("can't listen on", source))?;
        Ok(Self { listener, path: path.to_owned(), file, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.listener.accept().await?.0)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // The lock file stays: removing it would let two agents hold locks on
        // two files of the same name.
        if identity(&self.path).is_ok_and(|file| file == self.file)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "can't remove the control socket");
        }
    }
}

/// Makes a directory and what is missing above it, each 0755 whatever the umask:
/// the socket's own mode says who may connect.
fn make_directory(directory: &Path) -> Result<(), SocketError> {
    let missing: Vec<&Path> = directory
        .ancestors()
        .take_while(|ancestor| !ancestor.as_os_str().is_empty() && !ancestor.exists())
        .collect();
    for made in missing.into_iter().rev() {
        match fs::create_dir(made) {
            // Another agent that starts at the same time has made it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
            Ok(()) => fs::set_permissions(made, fs::Permissions::from_mode(0o755)),
        }
        .map_err(|source| SocketError::Io {
            what: "can't make the directory",
            path: made.to_owned(),
            source,
        })?;
    }
    Ok(())
}

/// Takes the lock that says who owns `path`. The kernel gives it back when the
/// process ends, however it ends.
fn lock(path: &Path) -> Result<File, SocketError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let failed = |source| SocketError::Io { what: "can't lock", path: lock_path.clone(), source };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&lock_path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Removes what a dead agent left at `path`.
fn clear(path: &Path, address: &UnixAddr) -> Result<(), SocketError> {
    let failed = |what, source| SocketError::Io { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("can't read", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match try_connect(address) {
        Err(Errno::ECONNREFUSED) => {
            fs::remove_file(path).map_err(|error| failed("can't remove the stale socket", error))
        }
        Err(Errno::ENOENT) => Ok(()),
        // A backlog that is full is somebody's, too.
        Ok(()) | Err(Errno::EAGAIN) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(errno) => Err(failed("can't tell who listens on", errno.into())),
    }
}

/// Connects without waiting for room in the listener's backlog.
fn try_connect(address: &UnixAddr) -> nix::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(descriptor.as_raw_fd(), address)
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("run/canary/agent.sock");
        (dir, path)
    }

    #[tokio::test]
    async fn it_is_made_with_its_directory_and_removed() {
        let (_dir, path) = place();
        let socket = ControlSocket::bind(&path).expect("bound");
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o7777;
        assert_eq!(mode(&path), 0o660);
        for made in path.ancestors().skip(1).take(2) {
            assert_eq!(mode(made), 0o755, "{}", made.display());
        }
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_living_agent_is_not_robbed() {
        let (_dir, path) = place();
        let first = ControlSocket::bind(&path).expect("bound");
        let message = ControlSocket::bind(&path).expect_err("in use").to_string();
        assert!(message.starts_with("another agent is listening on "), "{message}");
        // One that does not know of the lock file is one, too.
        drop(first);
        let _other = StdListener::bind(&path).expect("bound");
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::InUse { .. })));
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_dead_agents_socket_is_replaced() {
        let (_dir, path) = place();
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        drop(StdListener::bind(&path).expect("bound"));
        assert!(path.exists(), "std leaves the file");
        ControlSocket::bind(&path).expect("replaced");
    }

    #[tokio::test]
    async fn only_a_socket_is_replaced() {
        let (_dir, path) = place();
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(&path, "precious").expect("written");
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).expect("still there"), "precious");
    }

    #[tokio::test]
    async fn a_successors_socket_is_left_alone() {
        let (_dir, path) = place();
        let first = ControlSocket::bind(&path).expect("bound");
        fs::remove_file(&path).expect("removed");
        let _second = StdListener::bind(&path).expect("bound");
        drop(first);
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_says_so() {
        let (dir, _) = place();
        let path = dir.path().join("a".repeat(120));
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::TooLong { .. })));
    }
}
