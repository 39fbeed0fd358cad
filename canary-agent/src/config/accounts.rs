//! The host's users and groups, for `agent.operators`.

use nix::unistd::{Group, User};

/// Finds the numbers of users and groups by name.
pub trait Accounts {
    /// The user's number; `None` if there is no such user.
    fn uid(&self, name: &str) -> Option<u32>;
    /// The group's number; `None` if there is no such group.
    fn gid(&self, name: &str) -> Option<u32>;
}

/// The accounts that this host knows, from wherever its name service has them.
#[derive(Clone, Copy, Debug)]
pub struct HostAccounts;

impl Accounts for HostAccounts {
    fn uid(&self, name: &str) -> Option<u32> {
        let user = User::from_name(name).ok().flatten()?;
        Some(user.uid.as_raw())
    }

    fn gid(&self, name: &str) -> Option<u32> {
        let group = Group::from_name(name).ok().flatten()?;
        Some(group.gid.as_raw())
    }
}

/// No accounts at all: for texts that are checked apart from any host.
#[derive(Clone, Copy, Debug)]
pub struct NoAccounts;

impl Accounts for NoAccounts {
    fn uid(&self, _name: &str) -> Option<u32> {
        None
    }

    fn gid(&self, _name: &str) -> Option<u32> {
        None
    }
}
