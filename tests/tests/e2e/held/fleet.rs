//! What the configuration and operators say of each server in each service.

use std::collections::BTreeSet;

use canary_agent::store::Admin;
use canary_tests::{
    server::{ECHO_PORT, HTTP_PORT},
    topology::Host,
};

use crate::support::{ECHO, SHOP};

/// A server in a service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) configured: bool,
    pub(super) weight: u32,
    pub(super) admin: Admin,
}

impl Member {
    fn takes_new(self) -> bool {
        self.configured && self.weight > 0 && self.admin == Admin::Ready
    }
}

/// Both services' servers.
#[derive(Clone, Debug)]
pub(super) struct Fleet {
    shop: Vec<Member>,
    echo: Vec<Member>,
    /// Names of the hosts and of their versions.
    hosts: Vec<(String, String)>,
}

impl Fleet {
    /// Every host in both services.
    pub(super) fn new(hosts: &[Host]) -> Self {
        let one = Member { configured: true, weight: 1, admin: Admin::Ready };
        let names = hosts.iter().map(|host| (host.name.clone(), host.version.clone()));
        Self { shop: vec![one; hosts.len()], echo: vec![one; hosts.len()], hosts: names.collect() }
    }

    /// Port of a service.
    pub(super) fn port(&self, service: &str) -> u16 {
        if service == ECHO { ECHO_PORT } else { HTTP_PORT }
    }

    fn members(&mut self, service: &str) -> &mut [Member] {
        if service == ECHO { &mut self.echo } else { &mut self.shop }
    }

    /// What is said of a server.
    pub(super) fn member(&mut self, service: &str, server: usize) -> &mut Member {
        &mut self.members(service)[server]
    }

    /// The weight that the configuration gives a host; `None` if it is not there.
    pub(super) fn weight(&self, service: &str, host: &Host) -> Option<u32> {
        let members = if service == SHOP { &self.shop } else { &self.echo };
        let at = self.hosts.iter().position(|(name, _)| *name == host.name)?;
        Some(members[at]).filter(|m| m.configured).map(|m| m.weight)
    }

    /// Whether control has somebody for new connections with `member` in a server's place: else
    /// there is nobody to open them to.
    fn serves(&mut self, service: &str, server: usize, member: Member) -> bool {
        let of_control: Vec<bool> =
            self.hosts.iter().map(|(_, version)| version == "stable").collect();
        self.members(service).iter().enumerate().any(|(at, other)| {
            of_control[at] && if at == server { member } else { *other }.takes_new()
        })
    }

    /// Whether a server is there and may stop taking new connections.
    pub(super) fn may_go(&mut self, service: &str, server: usize) -> bool {
        let member = *self.member(service, server);
        member.configured && self.serves(service, server, Member { admin: Admin::Drain, ..member })
    }

    /// Whether a server may be the last of control that passes its checks: whoever else takes new
    /// connections fails them.
    pub(super) fn may_be_last(
        &mut self,
        service: &str,
        server: usize,
        failing: &BTreeSet<usize>,
    ) -> bool {
        let version = self.hosts[server].1 == "stable";
        let hosts = self.hosts.clone();
        let mut others = self.members(service).iter().zip(&hosts).enumerate();
        version
            && others.all(|(at, (other, (_, of)))| {
                at == server || of != "stable" || !other.takes_new() || failing.contains(&at)
            })
    }

    /// Adds or removes a server; what operators have told it is forgotten. One of each version
    /// stays.
    pub(super) fn toggle(&mut self, service: &str, server: usize) -> Option<String> {
        let version = self.hosts[server].1.clone();
        let before = *self.member(service, server);
        let after = Member { configured: !before.configured, admin: Admin::Ready, ..before };
        let hosts = self.hosts.clone();
        let others = self.members(service).iter().zip(&hosts).enumerate();
        let alone = !others
            .filter(|(at, (_, (_, of)))| *at != server && *of == version)
            .any(|(_, (member, _))| member.configured);
        if before.configured && alone || !self.serves(service, server, after) {
            return None;
        }
        *self.member(service, server) = after;
        Some(if after.configured { "added" } else { "removed" }.to_owned())
    }

    /// Gives a server another weight.
    pub(super) fn weigh(&mut self, service: &str, server: usize, weight: u32) -> Option<String> {
        let before = *self.member(service, server);
        let after = Member { weight, ..before };
        if !before.configured || before.weight == weight || !self.serves(service, server, after) {
            return None;
        }
        *self.member(service, server) = after;
        Some(format!("of weight {weight}"))
    }
}
