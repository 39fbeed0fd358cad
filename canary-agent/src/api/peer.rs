//! Who is at the other end of a connection, and what that one may do.
//!
//! The kernel says who it is (`SO_PEERCRED`, `SO_PEERGROUPS`), as of the moment
//! the peer connected. Must not know of HTTP.

use std::{io, os::fd::AsRawFd};

use tokio::net::UnixStream;

use crate::{config::model::Operators, daemon::Peer};

/// `getsockopt(2)` option for the peer's supplementary groups, Linux 4.13
/// (28b5ba2aa0f5). 59 on every architecture that the agent is built for.
const SO_PEERGROUPS: libc::c_int = 59;

/// Groups a process can have: `NGROUPS_MAX`.
const MOST_GROUPS: usize = 65_536;

/// A peer on the control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// As the loop is told.
    pub(super) peer: Peer,
    /// Supplementary groups.
    pub(super) groups: Vec<u32>,
}

impl Identity {
    /// Asks the kernel.
    ///
    /// # Errors
    /// What `getsockopt(2)` gives.
    pub(super) fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let peer = Peer { uid: credentials.uid(), gid: credentials.gid(), pid: credentials.pid() };
        Ok(Self { peer, groups: groups(stream)? })
    }

    /// Whether it may change things: root, the agent's own user, an operator.
    pub(super) fn may_change(&self, agent_uid: u32, operators: &Operators) -> bool {
        let Operators { uids, gids } = operators;
        let Peer { uid, gid, pid: _ } = self.peer;
        uid == 0
            || uid == agent_uid
            || uids.contains(&uid)
            || gids.contains(&gid)
            || self.groups.iter().any(|group| gids.contains(group))
    }
}

/// The supplementary groups of a stream's peer.
fn groups(stream: &impl AsRawFd) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut len_bytes = size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: `groups` owns `len_bytes` writable bytes, any bit pattern is a
        // gid_t, and the kernel writes at most `len_bytes` of them.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut len_bytes,
            )
        };
        let count = len_bytes as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // Too small: the kernel has said what is needed.
        let fits = groups.len() < count && count <= MOST_GROUPS;
        if error.raw_os_error() != Some(libc::ERANGE) || !fits {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(uid: u32, gid: u32, groups: &[u32]) -> Identity {
        let peer = Peer { uid, gid, pid: None };
        Identity { peer, groups: groups.to_vec() }
    }

    #[test]
    fn root_the_agent_and_operators_may_change_things() {
        let operators = Operators { uids: vec![1001], gids: vec![2001] };
        for (who, may) in [
            (identity(0, 0, &[]), true),
            (identity(900, 900, &[]), true),
            (identity(1001, 100, &[]), true),
            (identity(1002, 2001, &[]), true),
            (identity(1002, 100, &[100, 2001]), true),
            (identity(1002, 100, &[1001]), false),
            (identity(2001, 1001, &[900]), false),
        ] {
            assert_eq!(who.may_change(900, &operators), may, "{who:?}");
        }
        assert!(!identity(1001, 2001, &[2001]).may_change(900, &Operators::default()));
    }

    #[tokio::test]
    async fn the_kernel_says_who_is_there() {
        let (here, _there) = UnixStream::pair().expect("a pair");
        let identity = Identity::of(&here).expect("credentials");
        assert_eq!(identity.peer.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(identity.peer.pid, Some(std::process::id() as i32));
        let mut own: Vec<u32> = nix::unistd::getgroups()
            .expect("own groups")
            .into_iter()
            .map(nix::unistd::Gid::as_raw)
            .collect();
        let mut told = identity.groups;
        own.sort_unstable();
        told.sort_unstable();
        assert_eq!(told, own);
    }
}
