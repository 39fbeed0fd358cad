//! Fragments after the first.

use super::{Fragment, IP, Model, Onward, Packet, arrive::Transport, send::Way, wraps};
use crate::{
    abi::{FragmentRoute, IPPROTO_TCP, Reason, fragment as flags},
    entry::BackendIndex,
    extension,
    fragment::{Admission, Stretch, admit, alone, begin},
    hash::bucket,
    steer::Segment,
};

/// What of its datagram the fragment holds.
pub(super) fn stretch(packet: &Packet) -> Option<Stretch> {
    if !packet.v6 {
        let rest = packet.u16(IP + 6);
        return Some(Stretch {
            start: u32::from(rest & 0x1fff),
            bytes: u32::from(packet.u16(IP + 2)).checked_sub(packet.ihl() as u32)?,
            more: rest & 0x2000 != 0,
        });
    }
    let at = packet.fragment.as_ref()?.at;
    let rest = packet.u16(at + 2);
    Some(Stretch {
        start: u32::from(rest >> 3),
        bytes: packet.end().checked_sub(at + 8)? as u32,
        more: rest & 1 != 0,
    })
}

impl Model {
    /// Keeps the way of the packet at hand, if it is a first fragment.
    pub(super) fn keep(&mut self, packet: &Packet, route: FragmentRoute) -> Result<(), Reason> {
        let Some(Fragment { key, .. }) = &packet.fragment else { return Ok(()) };
        let first = stretch(packet).ok_or(Reason::DropMalformed)?;
        self.fragments.insert(*key, FragmentRoute { seen: begin(first), ..route });
        Ok(())
    }

    pub(super) fn later_fragment(&mut self, packet: &mut Packet) -> Result<Onward, Reason> {
        let held = stretch(packet).filter(|held| held.possible());
        // Its way is kept already.
        let Some(Fragment { key, .. }) = packet.fragment.take() else {
            return Err(Reason::PassFragment);
        };
        let (v6, protocol) = (packet.v6, packet.protocol);
        let any = self.tables.any(v6, packet.dst()).copied().filter(|any| {
            // Which protocol stands behind options, only the first fragment says.
            super::serves(any, protocol) || v6 && protocol == extension::DESTINATION
        });
        let route = self.fragments.get(&key).copied();
        if route.is_some_and(|route| route.flags & flags::PASSED != 0)
            || route.is_none() && any.is_none()
        {
            return Err(Reason::PassFragment);
        }
        let held = held.ok_or(Reason::DropMalformed)?;
        if !v6 && packet.ihl() < 20 || packet.end() > packet.bytes.len() {
            return Err(Reason::DropMalformed);
        }
        // RFC 3128, 3.
        if protocol == IPPROTO_TCP && held.start * 8 < 20 {
            return Err(Reason::DropFragmentTiny);
        }
        let Some(mut route) = route else {
            let any = any.ok_or(Reason::PassFragment)?;
            if !alone(&any) {
                return Err(Reason::DropFragmentEarly);
            }
            // What is hashed of it is the client alone.
            let segment = Segment { protocol, ..Segment::udp() };
            let nobody = Transport { src_port_be: 0, dst_port_be: 0, segment, ack: 0 };
            let hash = packet.hash(&any, &nobody);
            let entry = self.tables.entry(&any, bucket(&any, hash))?;
            if entry.tracked() {
                return Err(Reason::DropFragmentEarly);
            }
            let index = entry.current();
            if let Some(gue) = wraps(&any) {
                return self.wrap(packet, index, gue, hash as u32, None);
            }
            self.tables.usable(index)?;
            let way = self.way_to(index);
            return self.send(packet, way);
        };
        let translated = route.flags & flags::TRANSLATED != 0;
        if translated && packet.ttl() <= 1 {
            return Err(Reason::DropTtlExpired);
        }
        let admission = admit(&mut route, held);
        if admission != Admission::Overlap {
            self.fragments.insert(key, route);
        }
        let FragmentRoute { src, dst, eth, ifindex, vlan, backend, flags: how, .. } = route;
        match admission {
            Admission::Overlap => return Err(Reason::DropFragmentOverlap),
            Admission::Follow => {}
            Admission::Whole => {
                // It goes only where the fragment is sent; where not, it is as good as gone.
                let index = BackendIndex::new(backend);
                if how & (flags::RETURNED | flags::WRAPPED) != 0
                    || self.tables.usable(index).is_ok()
                {
                    self.fragments.remove(&key);
                }
            }
        }
        if translated {
            packet.route(src, dst);
        }
        let index = BackendIndex::new(backend);
        if how & flags::WRAPPED != 0 {
            return self.wrap(packet, index, how & flags::GUE != 0, src[0] as u32, None);
        }
        let returned = how & flags::RETURNED != 0;
        if !returned {
            self.tables.usable(index)?;
        }
        self.send(packet, Way { eth, ifindex, vlan, backend: index, returned, clamp: false })
    }
}
