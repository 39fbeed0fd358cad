//! Verdicts on the kernel, on rights, and on the clock.

use super::{
    Check, Name,
    facts::{Facts, Kernel, Rights},
    read,
};
use crate::datapath::OLDEST;

/// linux/capability.h, with what each is for and whether nothing works without it.
const CAPABILITIES: [(u32, &str, &str, bool); 4] = [
    (39, "CAP_BPF", "loading programs and making maps", true),
    (12, "CAP_NET_ADMIN", "attaching programs, addresses and reserved ports", true),
    (38, "CAP_PERFMON", "the arithmetic with pointers that the programs do", true),
    (13, "CAP_NET_RAW", "asking neighbours, and checks `via = \"vip\"`", false),
];
/// `CAP_SYS_ADMIN`, which stands for CAP_BPF and CAP_PERFMON.
const SYS_ADMIN: u32 = 21;

/// A clock that shows an earlier time than this is wrong: this program is younger.
const EARLIEST_UNIX_SECONDS: u64 = 1_735_689_600;

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let kernel = &facts.kernel;
    vec![
        release(kernel),
        bpf(kernel),
        jit(kernel),
        btf(kernel),
        unprivileged(kernel),
        memory(facts),
        capabilities(&facts.rights),
        clock(kernel),
    ]
}

fn release(kernel: &Kernel) -> Check {
    const EVIDENCE: &str = "uname -r";
    let (major, minor) = OLDEST;
    match kernel.recent {
        true => Check::ok(Name::KernelRelease, format!("Linux {}", kernel.release), EVIDENCE),
        false => Check::failed(
            Name::KernelRelease,
            format!("Linux {}, and {major}.{minor} or newer is needed", kernel.release),
            EVIDENCE,
        )
        .remedy(format!("boot Linux {major}.{minor} or newer")),
    }
}

fn bpf(kernel: &Kernel) -> Check {
    const EVIDENCE: &str = "bpf(2): an XDP program, each kind of map and each helper, tried";
    let name = Name::KernelBpf;
    match &kernel.lacks {
        None => Check::not_checked(name, "nothing is probed at a start", EVIDENCE),
        Some(Err(why)) => Check::not_checked(name, why.clone(), EVIDENCE)
            .remedy("sudo canary-agent doctor"),
        Some(Ok(lacks)) if lacks.is_empty() => {
            Check::ok(name, "it has all that the programs need", EVIDENCE)
        }
        Some(Ok(lacks)) => {
            Check::failed(name, format!("it lacks {}", lacks.join(", ")), EVIDENCE)
                .remedy("boot a distribution's own kernel, or one with CONFIG_BPF_SYSCALL and CONFIG_BPF_JIT")
        }
    }
}

fn jit(kernel: &Kernel) -> Check {
    const EVIDENCE: &str = "/proc/sys/net/core/bpf_jit_enable";
    match read(&kernel.jit, Name::KernelJit, EVIDENCE) {
        Err(check) => *check,
        Ok(0) => Check::warning(
            Name::KernelJit,
            "programs are interpreted, several times slower",
            EVIDENCE,
        )
        .remedy("sysctl -w net.core.bpf_jit_enable=1"),
        Ok(value) => {
            Check::ok(Name::KernelJit, format!("programs are compiled ({value})"), EVIDENCE)
        }
    }
}

fn btf(kernel: &Kernel) -> Check {
    const EVIDENCE: &str = "/sys/kernel/btf/vmlinux";
    let found = match kernel.btf {
        true => "the kernel has its own type information",
        false => "the kernel has no type information of its own, and none is needed",
    };
    Check::ok(Name::KernelBtf, found, EVIDENCE)
}

fn unprivileged(kernel: &Kernel) -> Check {
    const EVIDENCE: &str = "/proc/sys/kernel/unprivileged_bpf_disabled";
    match read(&kernel.unprivileged, Name::KernelUnprivileged, EVIDENCE) {
        Err(check) => *check,
        Ok(0) => Check::warning(
            Name::KernelUnprivileged,
            "every user of this host may load BPF programs",
            EVIDENCE,
        )
        .remedy("sysctl -w kernel.unprivileged_bpf_disabled=1"),
        Ok(value) => Check::ok(
            Name::KernelUnprivileged,
            format!("ordinary users may load no BPF programs ({value})"),
            EVIDENCE,
        ),
    }
}

fn memory(facts: &Facts) -> Check {
    let Kernel { maps_bytes, available_bytes, group_bytes, .. } = &facts.kernel;
    let name = Name::KernelMemory;
    let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
    let needs = format!("the maps take about {}", mib(*maps_bytes));
    if facts.places.pins.maps > 0 {
        return Check::ok(name, format!("{needs}, and are there"), "the pinned maps");
    }
    let smaller = "lower the sizes in `agent.capacity`";
    if let Some((left, file)) = group_bytes
        && left < maps_bytes
    {
        let found = format!("{needs}, and the control group has {} left", mib(*left));
        return Check::failed(name, found, file.clone())
            .remedy(format!("raise `MemoryMax=` of the unit, or {smaller}"));
    }
    const EVIDENCE: &str = "MemAvailable of /proc/meminfo";
    match read(available_bytes, name, EVIDENCE) {
        Err(check) => *check,
        Ok(available) => {
            let found = format!("{needs}, of {} that are to be had", mib(*available));
            match available {
                available if available < maps_bytes => {
                    Check::failed(name, found, EVIDENCE).remedy(smaller)
                }
                available if available / 2 < *maps_bytes => {
                    Check::warning(name, found, EVIDENCE).remedy(smaller)
                }
                _ => Check::ok(name, found, EVIDENCE),
            }
        }
    }
}

fn capabilities(rights: &Rights) -> Check {
    let Rights { whose, capabilities } = rights;
    let name = Name::Capabilities;
    let evidence = format!("CapEff of {whose}");
    let held = match read(capabilities, name, &evidence) {
        Err(check) => return *check,
        Ok(held) => *held,
    };
    let has = |bit: u32| held & (1 << bit) != 0;
    let missing = |needed: bool| -> Vec<String> {
        CAPABILITIES
            .iter()
            .filter(|(bit, capability, _, must)| {
                let implied = matches!(*capability, "CAP_BPF" | "CAP_PERFMON") && has(SYS_ADMIN);
                *must == needed && !has(*bit) && !implied
            })
            .map(|(_, capability, what, _)| format!("{capability} ({what})"))
            .collect()
    };
    let remedy = "start it as root, or by the unit in packaging/, which gives it what it needs";
    let (must, may) = (missing(true), missing(false));
    if !must.is_empty() {
        Check::failed(name, format!("it lacks {}", must.join(", ")), evidence).remedy(remedy)
    } else if !may.is_empty() {
        Check::warning(name, format!("it lacks {}", may.join(", ")), evidence).remedy(remedy)
    } else {
        Check::ok(name, "it has CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_NET_RAW", evidence)
    }
}

fn clock(kernel: &Kernel) -> Check {
    const EVIDENCE: &str = "clock_gettime(2), adjtimex(2)";
    let remedy = "run a time service: systemctl enable --now systemd-timesyncd (or chrony)";
    if kernel.unix_seconds < EARLIEST_UNIX_SECONDS {
        return Check::warning(
            Name::Clock,
            "the clock is years behind: the audit trail's times are wrong (nothing else goes by it)",
            EVIDENCE,
        )
        .remedy(remedy);
    }
    match read(&kernel.clock_kept, Name::Clock, EVIDENCE) {
        Err(check) => *check,
        Ok(true) => Check::ok(Name::Clock, "the clock is synchronised", EVIDENCE),
        Ok(false) => Check::warning(
            Name::Clock,
            "nobody synchronises the clock: the audit trail's times drift (nothing else goes by it)",
            EVIDENCE,
        )
        .remedy(remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, sample};

    fn verdict(check: &Check) -> (Verdict, bool) {
        (check.verdict, check.remedy.is_some())
    }

    fn with(change: impl FnOnce(&mut Facts)) -> Facts {
        let mut facts = sample::facts();
        change(&mut facts);
        facts
    }

    #[test]
    fn a_good_kernel_is_good() {
        for check in checks(&sample::facts()) {
            assert_eq!(verdict(&check), (Verdict::Ok, false), "{check:?}");
        }
    }

    #[test]
    fn an_old_kernel_fails() {
        let facts = with(|f| f.kernel.recent = false);
        assert_eq!(verdict(&release(&facts.kernel)), (Verdict::Failed, true));
    }

    #[test]
    fn what_the_kernel_lacks_is_named() {
        let facts = with(|f| f.kernel.lacks = Some(Ok(vec!["device hash maps".to_owned()])));
        let check = bpf(&facts.kernel);
        assert_eq!(verdict(&check), (Verdict::Failed, true));
        assert!(check.found.contains("device hash maps"));
        let facts = with(|f| f.kernel.lacks = Some(Err("not permitted".to_owned())));
        assert_eq!(verdict(&bpf(&facts.kernel)), (Verdict::NotChecked, true));
        let facts = with(|f| f.kernel.lacks = None);
        assert_eq!(bpf(&facts.kernel).verdict, Verdict::NotChecked);
    }

    #[test]
    fn settings_of_bpf_are_warnings() {
        let facts = with(|f| (f.kernel.jit, f.kernel.unprivileged) = (Ok(0), Ok(0)));
        assert_eq!(verdict(&jit(&facts.kernel)), (Verdict::Warning, true));
        assert_eq!(verdict(&unprivileged(&facts.kernel)), (Verdict::Warning, true));
        let facts = with(|f| f.kernel.jit = Err("no such file".to_owned()));
        assert_eq!(jit(&facts.kernel).verdict, Verdict::NotChecked);
    }

    #[test]
    fn maps_must_find_room() {
        let sized = |maps: u64, available: u64, group: Option<u64>| {
            let facts = with(|f| {
                f.kernel.maps_bytes = maps << 20;
                f.kernel.available_bytes = Ok(available << 20);
                f.kernel.group_bytes = group.map(|left| (left << 20, "memory.max".to_owned()));
            });
            memory(&facts).verdict
        };
        assert_eq!(sized(100, 1000, None), Verdict::Ok);
        assert_eq!(sized(100, 150, None), Verdict::Warning);
        assert_eq!(sized(100, 99, None), Verdict::Failed);
        assert_eq!(sized(100, 1000, Some(99)), Verdict::Failed);
        assert_eq!(sized(100, 1000, Some(101)), Verdict::Ok);
        let facts = with(|f| {
            f.kernel.maps_bytes = 1 << 40;
            f.places.pins.maps = 17;
        });
        assert_eq!(memory(&facts).verdict, Verdict::Ok, "they are there already");
    }

    #[test]
    fn capabilities_that_are_needed_fail_and_others_warn() {
        let held = |bits: &[u32]| {
            let mask = bits.iter().fold(0, |mask, bit| mask | 1_u64 << bit);
            let check = capabilities(&Rights { whose: "pid 1".into(), capabilities: Ok(mask) });
            (check.verdict, check.found)
        };
        assert_eq!(held(&[12, 13, 38, 39]).0, Verdict::Ok);
        assert_eq!(held(&[12, 13, SYS_ADMIN]).0, Verdict::Ok);
        let (verdict, found) = held(&[12, 38, 39]);
        assert_eq!(verdict, Verdict::Warning);
        assert!(found.contains("CAP_NET_RAW") && !found.contains("CAP_BPF"), "{found}");
        let (verdict, found) = held(&[12, 13, 39]);
        assert_eq!(verdict, Verdict::Failed);
        assert!(found.contains("CAP_PERFMON"), "{found}");
        assert_eq!(held(&[]).0, Verdict::Failed);
    }

    #[test]
    fn a_clock_that_nobody_keeps_is_a_warning() {
        let facts = with(|f| f.kernel.clock_kept = Ok(false));
        assert_eq!(verdict(&clock(&facts.kernel)), (Verdict::Warning, true));
        let facts = with(|f| f.kernel.unix_seconds = 0);
        assert_eq!(verdict(&clock(&facts.kernel)), (Verdict::Warning, true));
    }
}
