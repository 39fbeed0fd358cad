//! Unwrapping on a backend: which frames hold a packet for it, and what becomes of them.
//!
//! Whatever is not surely a wrapped packet for this host from whom it may come stays as it is, for
//! the host to judge.

use crate::{
    abi::{Address, IPPROTO_UDP},
    checksum::{Delta, fold},
    headers::{
        ETH_BYTES, ETHERTYPE_IPV4_BE, ETHERTYPE_IPV6_BE, Eth, Frame, Ipv4, Ipv6, Tag, Udp, is_tag,
    },
    tunnel::{IPPROTO_IPV4, IPPROTO_IPV6, unwrapped_tos},
};

/// Most tags before an IP header that is looked for.
pub const MAX_TAGS: usize = 2;

/// Addresses that `DECAP_ADDRESSES` has room for.
pub const MAX_ADDRESSES: u32 = 4096;
/// Networks that `DECAP_SENDERS` has room for.
pub const MAX_SENDERS: u32 = 4096;

macro_rules! outcomes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $value:literal, $name:literal;)+) => {
        /// What has become of a wrapped packet: index into `DECAP_COUNTERS`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Outcome {
            $($(#[doc = $doc])+ $variant = $value,)+
        }

        impl Outcome {
            /// Every outcome, in the order of its number.
            pub const ALL: &'static [Outcome] = &[$(Outcome::$variant),+];

            /// The word that the command and the documents use.
            pub const fn name(self) -> &'static str {
                match self { $(Outcome::$variant => $name,)+ }
            }

            /// What it means, in a sentence.
            pub const fn explanation(self) -> &'static str {
                match self { $(Outcome::$variant => concat!($($doc),+),)+ }
            }
        }
    };
}

outcomes! {
    /// Unwrapped: it was in IP.
    Ipip = 0, "unwrapped_ipip";
    /// Unwrapped: it was in UDP.
    Gue = 1, "unwrapped_gue";
    /// Not to one of the addresses that wrapped packets are taken at.
    PassAddress = 2, "pass_address";
    /// From nobody that wrapped packets are taken from.
    PassSender = 3, "pass_sender";
    /// The outer packet is a fragment: the host puts it together.
    PassFragment = 4, "pass_fragment";
    /// The outer UDP header has a checksum: the host looks whether it is right.
    PassChecksum = 5, "pass_checksum";
    /// A length, a version or the outer header's checksum is wrong.
    PassMalformed = 6, "pass_malformed";
    /// A router has marked the outer packet, and the inner one's sender does not understand the mark (RFC 6040, 4.2).
    DropCongestion = 7, "drop_congestion";
    /// The kernel did not let the frame become shorter.
    DropRefused = 8, "drop_refused";
}

/// Elements of `DECAP_COUNTERS`: room for outcomes to come.
pub const OUTCOME_SLOTS: u32 = 16;

/// Key of `DECAP_ADDRESSES`: an address with its family, 4 or 6.
pub type Own = [u64; 3];

/// What the program has been told.
pub trait Settings {
    /// Whether wrapped packets to this address are taken.
    fn is_own(&self, key: &Own) -> bool;
    /// Whether wrapped packets from this address are taken.
    fn may_send(&self, key: &Own) -> bool;
    /// The port that packets in UDP come to.
    fn gue_port_be(&self) -> u16;
}

/// Where the packet is in a frame that holds one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrapped {
    /// Tags behind the Ethernet addresses.
    pub tags: usize,
    /// Bytes between the Ethernet header, tags included, and the packet.
    pub outer_bytes: usize,
    /// Whether the packet is IPv6.
    pub v6: bool,
    /// How it was wrapped: [`Outcome::Ipip`] or [`Outcome::Gue`].
    pub outcome: Outcome,
}

/// Why a frame stays as it is: what is counted, if anything is.
pub type Left = Option<Outcome>;

/// What is known of the outer IP header.
#[derive(Clone, Copy)]
struct Outer {
    tos: u8,
    protocol: u8,
    fragment: bool,
    /// Where its payload begins and ends in the frame.
    payload: usize,
    end: usize,
    src: Own,
    dst: Own,
    right: bool,
}

/// Finds the packet that a frame holds, and gives it the outer header's congestion mark.
///
/// # Errors
/// With what is to be counted, where the frame is to stay as it is or, with
/// [`Outcome::DropCongestion`], is to be dropped.
#[inline(always)]
pub fn find<F: Frame, S: Settings>(frame: &F, settings: &S) -> Result<Wrapped, Left> {
    let eth: *mut Eth = frame.at(0).ok_or(None)?;
    // SAFETY: `at` checked the bounds.
    let (group, mut ethertype_be) = unsafe { ((*eth).addresses[0] & 1, (*eth).ethertype_be) };
    if group != 0 {
        return Err(None);
    }
    let mut tags = 0;
    while tags < MAX_TAGS && is_tag(ethertype_be) {
        let tag: *mut Tag = frame.at(ETH_BYTES + tags * size_of::<Tag>()).ok_or(None)?;
        // SAFETY: `at` checked the bounds.
        ethertype_be = unsafe { (*tag).ethertype_be };
        tags += 1;
    }
    let ip = ETH_BYTES + tags * size_of::<Tag>();
    let outer = match ethertype_be {
        ETHERTYPE_IPV4_BE => outer_v4(frame, ip),
        ETHERTYPE_IPV6_BE => outer_v6(frame, ip),
        _ => None,
    }
    .ok_or(None)?;
    let (v6, at, outcome) = match outer.protocol {
        IPPROTO_IPV4 => (false, outer.payload, Outcome::Ipip),
        IPPROTO_IPV6 => (true, outer.payload, Outcome::Ipip),
        // Fragments of a datagram but the first have no port: the host gets them all.
        IPPROTO_UDP if !outer.fragment => {
            let udp: *mut Udp = frame.at(outer.payload).ok_or(None)?;
            // SAFETY: `at` checked the bounds.
            let Udp { ports, length_be, checksum } = unsafe { *udp };
            if ports.dst_be != settings.gue_port_be() {
                return Err(None);
            }
            admitted(&outer, settings)?;
            if checksum != 0 {
                return Err(Some(Outcome::PassChecksum));
            }
            let length = usize::from(u16::from_be(length_be));
            if outer.payload + length != outer.end {
                return Err(Some(Outcome::PassMalformed));
            }
            let at = outer.payload + size_of::<Udp>();
            let (v6, header_bytes) = gue(frame, at)?;
            (v6, at + header_bytes, Outcome::Gue)
        }
        _ => return Err(None),
    };
    if outcome == Outcome::Ipip {
        admitted(&outer, settings)?;
    }
    let marked = match v6 {
        true => inner_v6(frame, at, &outer),
        false => inner_v4(frame, at, &outer),
    };
    marked?;
    Ok(Wrapped { tags, outer_bytes: at - ip, v6, outcome })
}

/// Whether a wrapped packet is from whom, and to where, it may be.
#[inline(always)]
fn admitted<S: Settings>(outer: &Outer, settings: &S) -> Result<(), Left> {
    if !settings.is_own(&outer.dst) {
        return Err(Some(Outcome::PassAddress));
    }
    if !settings.may_send(&outer.src) {
        return Err(Some(Outcome::PassSender));
    }
    if outer.fragment {
        return Err(Some(Outcome::PassFragment));
    }
    if !outer.right {
        return Err(Some(Outcome::PassMalformed));
    }
    Ok(())
}

#[inline(always)]
fn outer_v4<F: Frame>(frame: &F, at: usize) -> Option<Outer> {
    let ip: *mut Ipv4 = frame.at(at)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    // With options: the host's.
    if ip.version_ihl != 0x45 {
        return None;
    }
    let end = at + usize::from(u16::from_be(ip.total_length_be));
    Some(Outer {
        tos: ip.tos,
        protocol: ip.ttl_protocol[1],
        fragment: ip.fragment_be & Ipv4::FRAGMENT_MASK_BE != 0,
        payload: at + size_of::<Ipv4>(),
        end,
        src: [4, ip.src_be as u64, 0],
        dst: [4, ip.dst_be as u64, 0],
        right: fold(ip.sum()) == 0xffff && end <= frame.len_bytes(),
    })
}

#[inline(always)]
fn outer_v6<F: Frame>(frame: &F, at: usize) -> Option<Outer> {
    let ip: *mut Ipv6 = frame.at(at)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    let first = u32::from_be(ip.version_class_flow_be);
    let payload = at + size_of::<Ipv6>();
    let end = payload + usize::from(u16::from_be(ip.payload_length_be));
    Some(Outer {
        tos: (first >> 20) as u8,
        protocol: ip.next_header,
        fragment: false,
        payload,
        end,
        src: [6, ip.src[0], ip.src[1]],
        dst: [6, ip.dst[0], ip.dst[1]],
        right: first >> 28 == 6 && end <= frame.len_bytes(),
    })
}

/// What follows UDP: whether it is IPv6, and how long GUE's own header is.
#[inline(always)]
fn gue<F: Frame>(frame: &F, at: usize) -> Result<(bool, usize), Left> {
    let header: *mut [u8; 4] = frame.at(at).ok_or(Some(Outcome::PassMalformed))?;
    // SAFETY: `at` checked the bounds.
    match unsafe { *header } {
        // Variant 1: the packet itself.
        [first, ..] if first >> 4 == 4 => Ok((false, 0)),
        [first, ..] if first >> 4 == 6 => Ok((true, 0)),
        // Variant 0, data, without flags and options.
        [0, IPPROTO_IPV4, 0, 0] => Ok((false, 4)),
        [0, IPPROTO_IPV6, 0, 0] => Ok((true, 4)),
        _ => Err(Some(Outcome::PassMalformed)),
    }
}

#[inline(always)]
fn inner_v4<F: Frame>(frame: &F, at: usize, outer: &Outer) -> Result<(), Left> {
    let ip: *mut Ipv4 = frame.at(at).ok_or(Some(Outcome::PassMalformed))?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let header_bytes = usize::from(ip.version_ihl & 0xf) * 4;
    let length = usize::from(u16::from_be(ip.total_length_be));
    let sound = ip.version_ihl >> 4 == 4
        && header_bytes >= size_of::<Ipv4>()
        && header_bytes <= length
        && at + length <= outer.end;
    if !sound {
        return Err(Some(Outcome::PassMalformed));
    }
    let before = u16::from_ne_bytes([ip.version_ihl, ip.tos]);
    ip.tos = unwrapped_tos(outer.tos, ip.tos).ok_or(Some(Outcome::DropCongestion))?;
    let after = u16::from_ne_bytes([ip.version_ihl, ip.tos]);
    if before != after {
        ip.checksum = Delta::ZERO.replace_half(before, after).apply(ip.checksum);
    }
    Ok(())
}

#[inline(always)]
fn inner_v6<F: Frame>(frame: &F, at: usize, outer: &Outer) -> Result<(), Left> {
    let ip: *mut Ipv6 = frame.at(at).ok_or(Some(Outcome::PassMalformed))?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let first = u32::from_be(ip.version_class_flow_be);
    let length = size_of::<Ipv6>() + usize::from(u16::from_be(ip.payload_length_be));
    if first >> 28 != 6 || at + length > outer.end {
        return Err(Some(Outcome::PassMalformed));
    }
    let tos = unwrapped_tos(outer.tos, (first >> 20) as u8);
    let tos = tos.ok_or(Some(Outcome::DropCongestion))?;
    ip.version_class_flow_be = (first & !(0xff << 20) | (tos as u32) << 20).to_be();
    Ok(())
}

/// The key of an address.
pub const fn own(v6: bool, address: Address) -> Own {
    [if v6 { 6 } else { 4 }, address[0], address[1]]
}
