//! Who is at the other end of a connection, and what that one may do.
//!
//! The kernel says who has connected (`SO_PEERCRED`, `SO_PEERGROUPS`), as of that moment, and
//! who has written since ([`Senders`]). Must not know of HTTP.

use std::{io, os::fd::AsRawFd};

use tokio::net::UnixStream;

use super::senders::Senders;
use crate::{config::model::Operators, daemon::Peer};

/// `getsockopt(2)` option for the peer's supplementary groups, Linux 4.13
/// (28b5ba2aa0f5). 59 on every architecture that the agent is built for.
const SO_PEERGROUPS: libc::c_int = 59;

/// Groups a process can have: `NGROUPS_MAX`.
const MOST_GROUPS: usize = 65_536;

/// A peer on the control socket.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// As the loop is told.
    pub(super) peer: Peer,
    /// Supplementary groups.
    pub(super) groups: Vec<u32>,
    /// Who has written.
    pub(super) senders: Senders,
}

impl Identity {
    /// Asks the kernel.
    ///
    /// # Errors
    /// What `getsockopt(2)` gives.
    pub(super) fn of(stream: &UnixStream, senders: Senders) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let peer = Peer { uid: credentials.uid(), gid: credentials.gid(), pid: credentials.pid() };
        Ok(Self { peer, groups: groups(stream)?, senders })
    }

    /// Whether it may change things: root, the agent's own user, an operator; and whether all
    /// who have written on the connection may.
    pub(super) fn may_change(&self, agent_uid: u32, operators: &Operators) -> bool {
        self.connected_may(agent_uid, operators) && self.senders_may(agent_uid, operators)
    }

    /// Whether whoever connected may change things, and somebody who has written since may not.
    pub(super) fn was_passed_on(&self, agent_uid: u32, operators: &Operators) -> bool {
        self.connected_may(agent_uid, operators) && !self.senders_may(agent_uid, operators)
    }

    fn connected_may(&self, agent_uid: u32, operators: &Operators) -> bool {
        let Peer { uid, gid, pid: _ } = self.peer;
        user_may(uid, agent_uid, operators) || self.group_may(gid, operators)
    }

    fn senders_may(&self, agent_uid: u32, operators: &Operators) -> bool {
        let Peer { uid, gid: _, pid } = self.peer;
        self.senders.all(|sender| {
            // Supplementary groups are only known of the one that connected.
            let same = Some(sender.pid) == pid && sender.uid == uid;
            user_may(sender.uid, agent_uid, operators)
                || operators.gids.contains(&sender.gid)
                || (same && self.group_may(sender.gid, operators))
        })
    }

    fn group_may(&self, gid: u32, operators: &Operators) -> bool {
        let gids = &operators.gids;
        gids.contains(&gid) || self.groups.iter().any(|group| gids.contains(group))
    }
}

fn user_may(uid: u32, agent_uid: u32, operators: &Operators) -> bool {
    uid == 0 || uid == agent_uid || operators.uids.contains(&uid)
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
    use crate::api::senders::Sender;

    fn identity(uid: u32, gid: u32, groups: &[u32]) -> Identity {
        let peer = Peer { uid, gid, pid: Some(7) };
        let senders = Senders::default();
        senders.add(Sender { uid, gid, pid: 7 });
        Identity { peer, groups: groups.to_vec(), senders }
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

    #[test]
    fn who_writes_on_anothers_connection_has_no_more_rights_than_his_own() {
        let operators = Operators { uids: vec![1001], gids: vec![2001] };
        let root = || identity(0, 0, &[]);
        let after = |identity: Identity, uid, gid, pid| {
            identity.senders.add(Sender { uid, gid, pid });
            identity.may_change(900, &operators)
        };
        assert!(!after(root(), 1002, 100, 7), "root that has become somebody else");
        assert!(!after(root(), 1002, 100, 8), "somebody who was handed root's connection");
        assert!(after(root(), 1001, 100, 8), "an operator");
        assert!(after(root(), 1002, 2001, 8), "an operator by his group");
        let by_group = || identity(1002, 100, &[2001]);
        assert!(after(by_group(), 1002, 100, 7));
        assert!(!after(by_group(), 1002, 100, 8), "another process's groups are not known");
        assert!(!after(identity(1002, 100, &[]), 0, 0, 8), "whoever connected counts as well");
    }

    #[tokio::test]
    async fn the_kernel_says_who_is_there() {
        let (here, _there) = UnixStream::pair().expect("a pair");
        let identity = Identity::of(&here, Senders::default()).expect("credentials");
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
