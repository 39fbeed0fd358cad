//! What a driver says of itself: ethtool's ioctl, and the `netdev` family of generic netlink.

use std::{
    ffi::CString,
    io, mem,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use rtnetlink::{packet_core::NlasIterator, sys::protocols::NETLINK_GENERIC};

use crate::{
    doctor::facts::{Device, Found, Xdp},
    resolve::ask::Asker,
};

/// linux/sockios.h
const SIOCETHTOOL: libc::c_ulong = 0x8946;

// linux/ethtool.h
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
const ETH_FLAG_LRO: u32 = 1 << 15;

// linux/genetlink.h
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// `sizeof(struct genlmsghdr)`.
const GENL_HEADER_LEN: usize = 4;

// linux/netdev.h, Linux 6.3 (commit d3d854fd6a1d)
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const XDP_BASIC: u64 = 1 << 0;
const XDP_NDO_XMIT: u64 = 1 << 2;
const XDP_RX_SG: u64 = 1 << 5;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// Sockets to ask by.
pub(super) struct Reader {
    socket: io::Result<OwnedFd>,
    netdev: Found<(Asker, u16)>,
}

impl Reader {
    pub(super) fn open() -> Self {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        Self { socket: socket.map_err(Into::into), netdev: netdev() }
    }

    /// Asks for everything about one interface.
    pub(super) fn read(&mut self, name: &str, ifindex: u32) -> Device {
        let flags = self.value(name, ETHTOOL_GFLAGS);
        let flag = |bit: u32| flags.clone().map(|flags| flags & bit != 0);
        Device {
            driver: self.driver(name),
            xdp: self.xdp(ifindex),
            queues: self.queues(name),
            lro: flag(ETH_FLAG_LRO),
            gro: self.value(name, ETHTOOL_GGRO).map(|value| value != 0),
            tx_checksum: self.value(name, ETHTOOL_GTXCSUM).map(|value| value != 0),
            rx_vlan: flag(ETH_FLAG_RXVLAN),
        }
    }

    fn value(&self, name: &str, command: u32) -> Found<u32> {
        let mut value = Value { command, data: 0 };
        self.ethtool(name, &mut value)?;
        Ok(value.data)
    }

    fn driver(&self, name: &str) -> Found<String> {
        let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 160] };
        self.ethtool(name, &mut info)?;
        let text = info.driver.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    /// Queues that receive, in use and at most.
    fn queues(&self, name: &str) -> Found<(u32, u32)> {
        let mut channels = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
        self.ethtool(name, &mut channels)?;
        let Channels { max_rx, max_combined, rx, combined, .. } = channels;
        Ok((rx + combined, max_rx.max(max_combined)))
    }

    fn ethtool<T>(&self, name: &str, argument: &mut T) -> Found<()> {
        let socket = self.socket.as_ref().map_err(|error| error.to_string())?;
        let name = CString::new(name).map_err(|error| error.to_string())?;
        // SAFETY: all-zero bytes are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        let bytes = name.as_bytes_with_nul();
        if bytes.len() > request.ifr_name.len() {
            return Err("the name is too long".to_owned());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = std::ptr::from_mut(argument).cast();
        // SAFETY: `request` is a whole `ifreq` whose data pointer is to a live `repr(C)` value
        // of the length that its command says; the commands here read, and write only there.
        let result = unsafe {
            libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, std::ptr::from_mut(&mut request))
        };
        match result {
            0.. => Ok(()),
            _ => Err(format!("the driver does not say: {}", io::Error::last_os_error())),
        }
    }

    fn xdp(&mut self, ifindex: u32) -> Found<Xdp> {
        let (asker, family) = self.netdev.as_mut().map_err(|why| why.clone())?;
        let request = generic(NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
        let (_, answer) =
            asker.get(*family, &request).map_err(|error| format!("netdev netlink: {error}"))?;
        features(&answer).ok_or_else(|| "the kernel does not say".to_owned())
    }
}

/// The number of the family `netdev`.
fn netdev() -> Found<(Asker, u16)> {
    let unknown = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => {
            "Linux 6.3 or newer says what a driver can do; here a start finds out".to_owned()
        }
        _ => format!("generic netlink: {error}"),
    };
    let mut asker = Asker::open(NETLINK_GENERIC).map_err(unknown)?;
    let request = generic(CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, b"netdev\0");
    let (_, answer) = asker.get(GENL_ID_CTRL, &request).map_err(unknown)?;
    let id = attribute(&answer, CTRL_ATTR_FAMILY_ID).and_then(|id| id.try_into().ok());
    let id = id.map(u16::from_ne_bytes).ok_or("generic netlink: no number of `netdev`")?;
    Ok((asker, id))
}

/// A generic netlink message with one attribute.
fn generic(command: u8, kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![command, 1, 0, 0];
    bytes.extend((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn attribute(message: &[u8], kind: u16) -> Option<Vec<u8>> {
    let attributes = NlasIterator::new(message.get(GENL_HEADER_LEN..)?).flatten();
    let mut wanted = attributes.filter(|attribute| attribute.kind() == kind);
    wanted.next().map(|attribute| attribute.value().to_vec())
}

fn features(answer: &[u8]) -> Option<Xdp> {
    let bits = attribute(answer, NETDEV_A_DEV_XDP_FEATURES)?;
    let bits = u64::from_ne_bytes(bits.try_into().ok()?);
    Some(Xdp {
        native: bits & XDP_BASIC != 0,
        redirect_target: bits & XDP_NDO_XMIT != 0,
        several_parts: bits & XDP_RX_SG != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_read_and_garbage_is_none() {
        let answer =
            generic(NETDEV_CMD_DEV_GET, NETDEV_A_DEV_XDP_FEATURES, &0x25_u64.to_ne_bytes());
        let expected = Xdp { native: true, redirect_target: true, several_parts: true };
        assert_eq!(features(&answer), Some(expected));
        let none = generic(NETDEV_CMD_DEV_GET, NETDEV_A_DEV_XDP_FEATURES, &0_u64.to_ne_bytes());
        assert_eq!(features(&none).map(|xdp| xdp.native), Some(false));
        for length in 0..answer.len() {
            let _ = features(&answer[..length]);
        }
    }

    #[test]
    fn the_loopback_has_offloads_and_no_queues_to_set() {
        let device = Reader::open().read("lo", 1);
        assert!(device.gro.is_ok() && device.tx_checksum.is_ok(), "{device:?}");
        assert!(device.queues.is_err(), "{device:?}");
        let missing = Reader::open().read("no-such-link", u32::MAX);
        assert!(missing.driver.is_err() && missing.xdp.is_err(), "{missing:?}");
    }
}
