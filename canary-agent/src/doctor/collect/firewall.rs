//! The host's packet filter: chains of nftables over netlink, tables of iptables by name.

use std::{fs, io};

use rtnetlink::packet_core::NlasIterator;

use crate::{
    doctor::facts::{Firewall, Found},
    resolve::ask::Asker,
};

/// linux/netlink.h
const NETLINK_NETFILTER: isize = 12;
/// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETCHAIN: u16 = 4;
/// `sizeof(struct nfgenmsg)`.
const HEADER_LEN: usize = 4;

const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
/// `NLA_TYPE_MASK`: the two highest bits are flags.
const TYPE_MASK: u16 = 0x3fff;
/// `NF_DROP`.
const DROP: u32 = 0;

/// Reads all of it.
pub(super) fn read() -> Found<Firewall> {
    let mut firewall = Firewall::default();
    for (file, family) in [("ip_tables_names", "iptables"), ("ip6_tables_names", "ip6tables")] {
        // Without the module there is no file, and no table.
        match fs::read_to_string(format!("/proc/net/{file}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("/proc/net/{file}: {error}")),
            Ok(names) => {
                for table in names.lines() {
                    let of_kind = match table {
                        "nat" => &mut firewall.translates,
                        _ => &mut firewall.filters,
                    };
                    of_kind.insert(format!("{family} {table}"));
                }
            }
        }
    }
    let chains = match chains() {
        // A kernel without nftables.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL)) =>
        {
            return Ok(firewall);
        }
        chains => chains.map_err(|error| format!("nfnetlink: {error}"))?,
    };
    for payload in chains {
        take(&mut firewall, &payload);
    }
    Ok(firewall)
}

fn chains() -> io::Result<Vec<Vec<u8>>> {
    let mut asker = Asker::open(NETLINK_NETFILTER)?;
    // `nfgenmsg`: every family, version 0.
    let frames = asker.dump(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN, &[0; HEADER_LEN])?;
    Ok(frames.into_iter().map(|(_, payload)| payload).collect())
}

/// Takes in a chain; those that only other chains jump to have no type, and do not count.
fn take(firewall: &mut Firewall, payload: &[u8]) {
    let family = match payload.first() {
        Some(1) => "inet",
        Some(2) => "ip",
        Some(5) => "netdev",
        Some(7) => "bridge",
        Some(10) => "ip6",
        _ => return,
    };
    let (mut table, mut chain, mut kind, mut policy) = (String::new(), String::new(), None, None);
    for attribute in NlasIterator::new(payload.get(HEADER_LEN..).unwrap_or_default()).flatten() {
        let value = attribute.value();
        let text = || {
            let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        };
        match attribute.kind() & TYPE_MASK {
            NFTA_CHAIN_TABLE => table = text(),
            NFTA_CHAIN_NAME => chain = text(),
            NFTA_CHAIN_TYPE => kind = Some(text()),
            NFTA_CHAIN_POLICY => policy = value.try_into().ok().map(u32::from_be_bytes),
            _ => {}
        }
    }
    let Some(kind) = kind else { return };
    let name = format!("nftables {family} {table} {chain}");
    if policy == Some(DROP) {
        firewall.drops.insert(name.clone());
    }
    match kind.as_str() {
        "nat" => firewall.translates.insert(name),
        _ => firewall.filters.insert(name),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(family: u8, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![family, 0, 0, 0];
        for (kind, value) in attributes {
            bytes.extend((4 + value.len() as u16).to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(*value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn chains_are_told_apart() {
        let mut firewall = Firewall::default();
        let named = |name: &'static [u8], kind: &'static [u8], policy: &'static [u8]| {
            chain(
                1,
                &[
                    (NFTA_CHAIN_TABLE, b"t\0"),
                    (NFTA_CHAIN_NAME, name),
                    (NFTA_CHAIN_TYPE, kind),
                    (NFTA_CHAIN_POLICY, policy),
                ],
            )
        };
        take(&mut firewall, &named(b"input\0", b"filter\0", &[0, 0, 0, 0]));
        take(&mut firewall, &named(b"output\0", b"filter\0", &[0, 0, 0, 1]));
        take(&mut firewall, &named(b"post\0", b"nat\0", &[0, 0, 0, 1]));
        take(&mut firewall, &chain(2, &[(NFTA_CHAIN_NAME, b"jumped-to\0")]));
        take(&mut firewall, &[]);
        let list =
            |names: &std::collections::BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>();
        assert_eq!(list(&firewall.filters), ["nftables inet t input", "nftables inet t output"]);
        assert_eq!(list(&firewall.translates), ["nftables inet t post"]);
        assert_eq!(list(&firewall.drops), ["nftables inet t input"]);
    }
}
