//! Configurations, of any bytes: read without a panic, judged the same way twice, and every finding
//! with a place in a file. No file is opened: what the text names is in memory.
#![no_main]

use std::{io, path::Path, sync::LazyLock};

use canary_agent::config::{Outside, Severity, difference, load_bytes};
use libfuzzer_sys::fuzz_target;
use tokio_rustls::rustls::pki_types::CertificateDer;

#[path = "../../canary-agent/tests/config/places.rs"]
mod places;
#[path = "../../canary-agent/tests/audience/writer.rs"]
#[expect(dead_code, reason = "its own tests use more of it")]
mod writer;

use writer::{Data, Writer};

static CITIES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let code = |code| Data::Map(vec![("iso_code", Data::Text(code))]);
    let iowa = Data::Map(vec![
        ("country", code("US")),
        ("subdivisions", Data::List(vec![code("IA")])),
        ("location", Data::Map(vec![("accuracy_radius", Data::U16(20))])),
    ]);
    let mut file = Writer::new(true);
    file.add("12.34.56.0/21", &iowa);
    file.add("81.2.69.0/24", &Data::Map(vec![("country", code("GB"))]));
    file.add("2001:db8::/33", &iowa);
    file.finish(28)
});

/// Two accounts and three files.
struct Host;

impl Outside for Host {
    fn uid(&self, name: &str) -> Option<u32> {
        (name == "alice").then_some(1000)
    }

    fn gid(&self, name: &str) -> Option<u32> {
        (name == "ops").then_some(2000)
    }

    fn file(&self, path: &Path) -> io::Result<Vec<u8>> {
        match path.to_str() {
            Some("City.mmdb") => Ok(CITIES.clone()),
            Some("staff.cidr") => Ok(b"198.51.100.0/24 # Ames\n2001:db8:aa::/48\n".to_vec()),
            Some("odd.cidr") => Ok(b"198.51.100.7/24\n\xff\n".to_vec()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn authorities(&self) -> Vec<CertificateDer<'static>> {
        Vec::new()
    }
}

fuzz_target!(|bytes: &[u8]| {
    // A file ends at a byte that TOML does not have; the first is the main one.
    let names = ["agent.toml", "1.toml", "2.toml", "3.toml"].map(Path::new);
    let files: Vec<(&Path, &[u8])> = names.into_iter().zip(bytes.splitn(4, |b| *b == 0)).collect();
    let judged = load_bytes(&files, &Host);
    assert_eq!(judged, load_bytes(&files, &Host), "the same files are judged in another way");
    match judged {
        Ok(loaded) => {
            places::check_places(&files, &loaded.warnings);
            assert!(loaded.warnings.iter().all(|w| w.severity == Severity::Warning));
            let config = &loaded.config;
            assert!(!config.agent.interfaces.is_empty() || config.services.is_empty());
            assert!(difference::of_agents(&config.agent, &config.agent).is_empty());
            for service in &config.services {
                assert!(service.control < service.versions.len());
                assert!(service.versions.iter().all(|version| !version.backends.is_empty()));
                assert!(!service.vips.is_empty() && !service.ports.is_empty());
                assert!(difference::of_services(service, service).is_empty());
            }
        }
        Err(found) => {
            assert!(found.iter().any(|finding| finding.severity == Severity::Error));
            places::check_places(&files, &found);
        }
    }
});
