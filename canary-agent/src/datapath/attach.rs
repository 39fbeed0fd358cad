//! Attaching the program to interfaces, and telling what is attached there.

use std::io;

use aya::programs::{
    Xdp, XdpMode as AyaMode,
    links::{FdLink, PinnedLink},
    loaded_programs,
    xdp::XdpLink,
};
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage, LinkXdp, XdpAttached},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::net::if_::if_nametoindex;

use super::{Error, links, pins::Pins};
use crate::config::model::XdpMode;

/// An interface that the program is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its index.
    pub ifindex: u32,
    /// How.
    pub mode: AttachedMode,
    /// Why it is not what could be wished.
    pub warning: Option<String>,
}

/// Where packets meet the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachedMode {
    /// In the driver.
    Native,
    /// In the network stack, after a socket buffer was made.
    Generic,
}

impl AttachedMode {
    /// The word used in `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// An XDP program on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) id: u32,
    pub(super) mode: Option<AttachedMode>,
}

/// Attaches `program`, taking over the pinned link of an earlier agent where there is one.
pub(super) fn attach(
    program: &mut Xdp,
    pins: &Pins,
    interface: &str,
    mode: XdpMode,
    replace: bool,
) -> Result<Attached, Error> {
    let failed = |reason: String| Error::Attach { interface: interface.to_owned(), reason };
    let ifindex = if_nametoindex(interface)
        .map_err(|_| Error::NoInterface { interface: interface.to_owned() })?;
    let pin = pins.link(interface);
    if pin.exists() {
        let held = links::pinned(&pin)
            .map_err(|e| failed(format!("{} can't be looked at: {e}", pin.display())))?;
        let Some(held) = held else {
            return Err(failed(format!(
                "{} is no XDP link, which is what the agent keeps there: move it away",
                pin.display()
            )));
        };
        told_apart(pins, interface, held, program.info().ok().map(|info| info.id()));
        if let Some(attached) = take_over(program, &pin, ifindex, mode)? {
            return Ok(attached);
        }
        // The link of an interface that is gone, or of another mode than is asked now.
        links::unpin(&pin).map_err(|e| failed(format!("removing {}: {e}", pin.display())))?;
    }
    if let Some(found) = found_on(ifindex).map_err(|e| failed(e.to_string()))? {
        let name = program_name(found.id);
        if !replace {
            return Err(Error::OtherProgram {
                interface: interface.to_owned(),
                id: found.id,
                name,
            });
        }
        take_off(ifindex, &found)
            .map_err(|e| failed(format!("taking XDP program {} ({name}) off: {e}", found.id)))?;
    }
    let tried = match mode {
        XdpMode::Native => vec![(AyaMode::Driver, AttachedMode::Native)],
        XdpMode::Generic => vec![(AyaMode::Skb, AttachedMode::Generic)],
        XdpMode::Auto => {
            vec![(AyaMode::Driver, AttachedMode::Native), (AyaMode::Skb, AttachedMode::Generic)]
        }
    };
    let mut reasons = Vec::new();
    for (flag, mode) in tried {
        match attach_fresh(program, ifindex, flag) {
            Ok(link) => {
                let link = link
                    .pin(&pin)
                    .map_err(|e| failed(format!("pinning the link at {}: {e}", pin.display())))?;
                drop(link);
                let warning = reasons.first().map(|reason| {
                    format!("attached in generic mode, which is slower: the driver refuses native mode ({reason})")
                });
                return Ok(Attached { ifindex, mode, warning });
            }
            Err(reason) => reasons.push(reason),
        }
    }
    Err(failed(reasons.join("; ")))
}

/// Says in the log if an interface has another program than the pinned one: an agent was ended
/// while it took over, or somebody has put it there.
fn told_apart(pins: &Pins, interface: &str, held: links::PinnedXdp, ours: Option<u32>) {
    let pinned = aya::programs::ProgramInfo::from_pin(pins.program()).ok().map(|p| p.id());
    if held.ifindex != 0 && Some(held.program) != ours && pinned.is_some_and(|p| p != held.program)
    {
        tracing::info!(
            interface,
            program = held.program,
            pinned,
            "the interface has another program than the one that is pinned; it is replaced"
        );
    }
}

/// Replaces the program of a pinned link, atomically. `None` if the link is of no use any more.
fn take_over(
    program: &mut Xdp,
    pin: &std::path::Path,
    ifindex: u32,
    wanted: XdpMode,
) -> Result<Option<Attached>, Error> {
    let Some(found) = found_on(ifindex).map_err(Error::Io)? else { return Ok(None) };
    let Ok(link) = PinnedLink::from_pin(pin) else { return Ok(None) };
    let mode = found.mode.unwrap_or(AttachedMode::Generic);
    let fits = match wanted {
        XdpMode::Auto => true,
        XdpMode::Native => mode == AttachedMode::Native,
        XdpMode::Generic => mode == AttachedMode::Generic,
    };
    let link: FdLink = link.into();
    let Ok(link) = XdpLink::try_from(link) else { return Ok(None) };
    if !fits {
        return Ok(None);
    }
    let Ok(id) = program.attach_to_link(link) else { return Ok(None) };
    // Out of the program's keeping: the pin holds the link when the agent ends.
    drop(program.take_link(id)?);
    let on_it = found_on(ifindex).map_err(Error::Io)?;
    if on_it.is_none_or(|now| Some(now.id) != program.info().ok().map(|i| i.id())) {
        return Ok(None);
    }
    let warning = (mode == AttachedMode::Generic && wanted == XdpMode::Auto)
        .then(|| "attached in generic mode, which is slower".to_owned());
    Ok(Some(Attached { ifindex, mode, warning }))
}

/// Attaches by a link that can be pinned.
fn attach_fresh(program: &mut Xdp, ifindex: u32, mode: AyaMode) -> Result<FdLink, String> {
    let id = program.attach_to_if_index(ifindex, mode).map_err(|e| chain(&e))?;
    let link = program.take_link(id).map_err(|e| chain(&e))?;
    // Where links are refused, aya falls back to netlink; such an attachment ends with
    // the process and can't be pinned. Dropping it takes the program off again.
    FdLink::try_from(link).map_err(|_| "the driver takes no BPF link".to_owned())
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The XDP program on an interface.
pub(super) fn found_on(ifindex: u32) -> io::Result<Option<Found>> {
    let mut request = LinkMessage::default();
    request.header.index = ifindex;
    let answer = ask(RouteNetlinkMessage::GetLink(request), 0)?;
    let RouteNetlinkMessage::NewLink(link) = answer else { return Ok(None) };
    let mut found = None;
    let mut mode = None;
    for attribute in link.attributes {
        let LinkAttribute::Xdp(xdp) = attribute else { continue };
        for part in xdp {
            match part {
                LinkXdp::ProgId(id) if id != 0 => found = Some(id),
                LinkXdp::Attached(XdpAttached::Driver) => mode = Some(AttachedMode::Native),
                LinkXdp::Attached(XdpAttached::SocketBuffer) => mode = Some(AttachedMode::Generic),
                _ => {}
            }
        }
    }
    Ok(found.map(|id| Found { id, mode }))
}

/// Takes somebody else's program off an interface, however it was attached.
fn take_off(ifindex: u32, found: &Found) -> io::Result<()> {
    if links::detach(found.id, ifindex)? {
        return Ok(());
    }
    const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    let flags = match found.mode {
        Some(AttachedMode::Native) => XDP_FLAGS_DRV_MODE,
        _ => XDP_FLAGS_SKB_MODE,
    };
    let mut request = LinkMessage::default();
    request.header.index = ifindex;
    request.attributes.push(LinkAttribute::Xdp(vec![LinkXdp::Fd(-1), LinkXdp::Flags(flags)]));
    ask(RouteNetlinkMessage::SetLink(request), netlink_packet_core::NLM_F_ACK).map(|_| ())
}

/// Sends one request to the kernel and returns the first answer.
fn ask(request: RouteNetlinkMessage, flags: u16) -> io::Result<RouteNetlinkMessage> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let echo = request.clone();
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (received, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&received)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
    match answer.payload {
        NetlinkPayload::InnerMessage(inner) => Ok(inner),
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(echo),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "unexpected netlink answer")),
    }
}

/// The name that a loaded program was given.
fn program_name(id: u32) -> String {
    loaded_programs()
        .flatten()
        .find(|p| p.id() == id)
        .and_then(|p| p.name_as_str().map(str::to_owned))
        .unwrap_or_else(|| "unnamed".to_owned())
}
