//! The interfaces of the configuration: which are there, and what is attached to them.

use std::{collections::BTreeMap, sync::Arc};

use super::{Attachment, Kernel, LinkStates, Moment, State};
use crate::{plan::InterfaceMacs, store::StateStore};

/// Said of an interface that is not there.
pub(super) const NO_SUCH_INTERFACE: &str =
    "the interface does not exist; it is attached when it appears";

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Takes over which MAC addresses frames for this host have.
    pub(super) fn macs(&mut self, macs: Arc<BTreeMap<u32, InterfaceMacs>>) {
        if self.macs.as_ref() == Some(&macs) {
            return;
        }
        match self.kernel.set_macs(&macs) {
            Ok(()) => self.macs = Some(macs),
            // Tried again when anything changes on the host.
            Err(error) => tracing::error!(error, "the interfaces' MAC addresses can't be written"),
        }
    }

    /// Takes over which interfaces there are, and attaches to those that have come.
    pub(super) fn links(&mut self, links: LinkStates, now: Moment) {
        self.links = links;
        for at in 0..self.interfaces.len() {
            let interface = &mut self.interfaces[at];
            match self.links.get(&interface.name).copied().flatten() {
                None if interface.mode.is_some() => {
                    tracing::warn!(interface = interface.name, "the interface is gone");
                    let text = format!("interface {} is gone", interface.name);
                    self.notices.add(now, "interface", "", text);
                    (interface.ifindex, interface.mode) = (None, None);
                    interface.message = Some(NO_SUCH_INTERFACE.to_owned());
                }
                Some(ifindex) if self.in_force && interface.ifindex != Some(ifindex) => {
                    self.attach(at, now)
                }
                _ => {}
            }
        }
    }

    /// Puts the program on the interface at `at`, or notes why not.
    pub(super) fn attach(&mut self, at: usize, now: Moment) {
        let interface = &mut self.interfaces[at];
        match self.kernel.attach(&interface.name) {
            Ok(Attachment { ifindex, mode, warning }) => {
                tracing::info!(interface = interface.name, mode, "attached");
                let text = format!("attached to {}, {mode}", interface.name);
                self.notices.add(now, "interface", "", text);
                if let Some(warning) = &warning {
                    tracing::warn!(interface = interface.name, "{warning}");
                }
                interface.ifindex = Some(ifindex);
                interface.mode = Some(mode.to_owned());
                interface.message = warning;
            }
            Err(error) => {
                let message = error.to_string();
                if interface.message.as_ref() != Some(&message) {
                    tracing::error!(interface = interface.name, "not attached: {message}");
                    let text = format!("not attached to {}: {message}", interface.name);
                    self.notices.add(now, "interface", "", text);
                }
                (interface.ifindex, interface.mode) = (None, None);
                interface.message = Some(message);
            }
        }
    }
}
