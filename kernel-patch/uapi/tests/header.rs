//! The Rust structures against the C headers: a C program that prints the headers' sizes, offsets
//! and numbers is compiled and run.

use std::fmt::Write as _;
use std::mem::offset_of;
use std::process::Command;

use pseudo_mm_uapi::abi::*;

/// Each value by the C expression that should equal it.
fn expected() -> Vec<(String, u64)> {
    let mut values = Vec::new();
    macro_rules! structures {
        ($($c:literal = $name:ident { $($field:ident),* })*) => {$(
            values.push((format!("sizeof(struct {})", $c), size_of::<$name>() as u64));
            $(values.push((
                format!("offsetof(struct {}, {})", $c, stringify!($field)),
                offset_of!($name, $field) as u64,
            ));)*
        )*};
    }
    structures! {
        "pseudo_mm_info" = Info {
            size, version, features, page_size, max_templates, max_maps, max_extents, templates,
            device_pages
        }
        "pseudo_mm_register" = Register { size, dax_fd, device_pages }
        "pseudo_mm_register_remote" = RegisterRemote { size, fd, flags, reserved, remote_pages }
        "pseudo_mm_create" = Create { size, flags, id }
        "pseudo_mm_map" = Map { start, length, prot, flags, fd, reserved, offset }
        "pseudo_mm_extent" = Extent { address, pages, device_page, source, reserved }
        "pseudo_mm_add" = Add {
            size, flags, maps, nr_maps, map_size, extents, nr_extents, extent_size
        }
        "pseudo_mm_seal" = Flags { size, flags }
        "pseudo_mm_delete" = Flags { size, flags }
        "pseudo_mm_attach" = Attach { size, flags, failed_at, pidfd, reserved }
        "pseudo_mm_promote" = Promote { size, flags, start, length, pages }
        "pseudo_mm_stat" = Stat {
            size, state, id, maps, extents, pool_pages, attached, mapped, owner, reserved,
            local_pages
        }
        "pseudo_mm_list" = List { size, entry_size, entries, capacity, count }
        "pseudo_mm_query" = Query {
            size, flags, maps, nr_maps, map_size, extents, nr_extents, extent_size
        }
        "pseudo_mm_rdma_connect" = RdmaConnect {
            size, timeout_ms, server, server_size, hello_size, hello, pages, generation, uuid
        }
        "pseudo_mm_rdma_pool" = RdmaPool {
            magic, version, address, pages, generation, uuid, rkey, page_size
        }
    }
    let numbers = [
        ("PSEUDO_MM_VERSION", VERSION.into()),
        ("PSEUDO_MM_FEATURE_ATTACH", FEATURE_ATTACH),
        ("PSEUDO_MM_FEATURE_PUBLISHED", FEATURE_PUBLISHED),
        ("PSEUDO_MM_FEATURE_LAZY", FEATURE_LAZY),
        ("PSEUDO_MM_FEATURE_REMOTE", FEATURE_REMOTE),
        ("PSEUDO_MM_FEATURE_PROCESS", FEATURE_PROCESS),
        ("PSEUDO_MM_FEATURE_PROMOTE_MAPPED", FEATURE_PROMOTE_MAPPED),
        ("PSEUDO_MM_FEATURE_FIGURES", FEATURE_FIGURES),
        ("PSEUDO_MM_REMOTE_PUBLISHED", REMOTE_PUBLISHED.into()),
        ("PSEUDO_MM_SOURCE_DEVICE", SOURCE_DEVICE.into()),
        ("PSEUDO_MM_SOURCE_REMOTE", SOURCE_REMOTE.into()),
        ("PSEUDO_MM_ATTACH_PIDFD", ATTACH_PIDFD.into()),
        ("PSEUDO_MM_PROMOTE_MAPPED", PROMOTE_MAPPED.into()),
        ("PSEUDO_MM_STATE_SEALED", STATE_SEALED.into()),
        ("PSEUDO_MM_STATE_DELETED", STATE_DELETED.into()),
        ("PSEUDO_MM_STATE_GONE", STATE_GONE.into()),
        ("PSEUDO_MM_INFO", INFO.into()),
        ("PSEUDO_MM_REGISTER", REGISTER.into()),
        ("PSEUDO_MM_CREATE", CREATE.into()),
        ("PSEUDO_MM_LIST", LIST.into()),
        ("PSEUDO_MM_REGISTER_REMOTE", REGISTER_REMOTE.into()),
        ("PSEUDO_MM_ADD", ADD.into()),
        ("PSEUDO_MM_SEAL", SEAL.into()),
        ("PSEUDO_MM_ATTACH", ATTACH.into()),
        ("PSEUDO_MM_STAT", STAT.into()),
        ("PSEUDO_MM_QUERY", QUERY.into()),
        ("PSEUDO_MM_DELETE", DELETE.into()),
        ("PSEUDO_MM_PROMOTE", PROMOTE.into()),
        ("PSEUDO_MM_RDMA_CONNECT", RDMA_CONNECT.into()),
        ("PSEUDO_MM_RDMA_MAGIC", RDMA_MAGIC.into()),
        ("PSEUDO_MM_RDMA_VERSION", RDMA_VERSION.into()),
        ("PSEUDO_MM_RDMA_MAX_HELLO", RDMA_MAX_HELLO.into()),
    ];
    values.extend(numbers.map(|(name, value): (_, u64)| (name.to_owned(), value)));
    // The published set has no Rust side; these are its numbers and layouts on x86-64.
    let published = [
        ("PSEUDO_MM_V0_REGISTER", 0x4008_1c00),
        ("PSEUDO_MM_V0_CREATE", 0x8008_1c01),
        ("PSEUDO_MM_V0_DELETE", 0x4008_1c02),
        ("PSEUDO_MM_V0_ADD_MAP", 0x4008_1c03),
        ("PSEUDO_MM_V0_SETUP_PT", 0x4008_1c04),
        ("PSEUDO_MM_V0_ATTACH", 0x4008_1c05),
        ("PSEUDO_MM_V0_BRING_BACK", 0x4008_1c06),
        ("PSEUDO_MM_V0_PF_STAT", 0xc008_1c07),
        ("sizeof(struct pseudo_mm_v0_add_map)", 56),
        ("offsetof(struct pseudo_mm_v0_add_map, fd)", 40),
        ("offsetof(struct pseudo_mm_v0_add_map, offset)", 48),
        ("sizeof(struct pseudo_mm_v0_setup_pt)", 40),
        ("offsetof(struct pseudo_mm_v0_setup_pt, pgoff)", 24),
        ("offsetof(struct pseudo_mm_v0_setup_pt, type)", 32),
        ("sizeof(struct pseudo_mm_v0_attach)", 8),
        ("offsetof(struct pseudo_mm_v0_attach, id)", 4),
        ("sizeof(struct pseudo_mm_v0_bring_back)", 24),
        ("sizeof(struct pseudo_mm_v0_pf_stat)", 20),
    ];
    values.extend(published.map(|(name, value): (_, u64)| (name.to_owned(), value)));
    values
}

#[test]
fn every_size_offset_and_number_is_the_headers() {
    let expected = expected();
    let mut source = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"pseudo_mm.h\"\n\
         #include \"pseudo_mm_rdma.h\"\nint main(void)\n{\n",
    );
    for (expression, _) in &expected {
        writeln!(
            source,
            "\tprintf(\"%llu\\n\", (unsigned long long)({expression}));"
        )
        .unwrap();
    }
    source.push_str("\treturn 0;\n}\n");

    let folder = tempfile::tempdir().unwrap();
    let (file, program) = (folder.path().join("layout.c"), folder.path().join("layout"));
    std::fs::write(&file, source).unwrap();
    let header = concat!(env!("CARGO_MANIFEST_DIR"), "/../driver/include/uapi/linux");
    let compiled = Command::new("cc")
        .args(["-Wall", "-Werror", "-I", header, "-o"])
        .args([&program, &file])
        .output()
        .expect("cc, the C compiler, is needed: apt-get install gcc");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let output = Command::new(&program).output().unwrap();
    let printed: Vec<u64> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();

    assert_eq!(printed.len(), expected.len());
    for ((expression, rust), c) in expected.iter().zip(printed) {
        assert_eq!(*rust, c, "{expression}");
    }
}
