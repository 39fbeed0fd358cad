//! Flow entries that the agent has no more use for, taken away where packets are handled.
//!
//! The agent runs these programs itself (`BPF_PROG_TEST_RUN`) on a list of entries, and they
//! are attached to nothing.

use aya_ebpf::{macros::xdp, programs::XdpContext};
use canary_ebpf_common::{
    abi::{FORGET_MOST, FORGET_OFFSET, FlowKeyV4, FlowKeyV6, Forget},
    headers::Frame as _,
    nat,
};

use crate::{
    maps::{FlowsV4, FlowsV6},
    packet::Packet,
};

macro_rules! forget {
    ($name:ident, $key:ty, $table:expr) => {
        /// Answers with the number of entries that went.
        #[xdp]
        pub(crate) fn $name(ctx: XdpContext) -> u32 {
            let packet = Packet::of(ctx.ctx);
            let mut gone = 0;
            let mut n = 0;
            while n < FORGET_MOST {
                let at = FORGET_OFFSET + n * size_of::<Forget<$key>>();
                let Some(wanted) = packet.at::<Forget<$key>>(at) else { break };
                // SAFETY: `at` checked the bounds.
                let wanted = unsafe { &*wanted };
                gone += nat::forget(&$table, wanted, wanted.key.protocol as u8);
                n += 1;
            }
            gone
        }
    };
}

forget!(forget_v4, FlowKeyV4, FlowsV4);
forget!(forget_v6, FlowKeyV6, FlowsV6);
