//! Which of the ABI's types may be copied to and from map memory as bytes.

use aya::Pod;
use canary_ebpf_common::abi;

/// A map key or value as aya sees it.
macro_rules! pod {
    ($($wrapper:ident($inner:ty);)+) => {$(
        /// The ABI type of the same name.
        #[derive(Clone, Copy, Debug, PartialEq)]
        #[repr(transparent)]
        pub(super) struct $wrapper(pub(super) $inner);

        // SAFETY: integers only, `repr(C)`, with all padding spelled out, as the
        // ABI module asserts: every bit pattern is a value, and no byte is uninitialised.
        unsafe impl Pod for $wrapper {}
    )+};
}

pod! {
    ServiceInfo(abi::ServiceInfo);
    Meta(abi::Meta);
    BackendCounters(abi::BackendCounters);
    FlowCounters(abi::FlowCounters);
    FlowKeyV4(abi::FlowKeyV4);
    FlowKeyV6(abi::FlowKeyV6);
    Flow(abi::Flow);
    MacKey(abi::MacKey);
    TableKey(abi::TableKey);
    ClassState(abi::ClassState);
    Service(abi::Service);
    Sampling(abi::Sampling);
    Sample(abi::Sample);
    VersionSignals(abi::VersionSignals);
}
