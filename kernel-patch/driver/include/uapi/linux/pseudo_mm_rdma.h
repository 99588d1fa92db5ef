/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/pseudo_mm_rdma: pools on other machines, read by RDMA.
 *
 * A descriptor is a connection to a server that has a pool in memory which it
 * lets others read. Once connected it is registered as a remote pool
 * (PSEUDO_MM_REGISTER_REMOTE); the kernel then reads the server's memory page
 * by page, without the server's processor. No bytes are ever written there.
 *
 * Both sides use the RDMA connection manager, port space RDMA_PS_TCP. The
 * client's request carries bytes of the caller's choice by which a server may
 * know it. A server that accepts answers with a struct pseudo_mm_rdma_pool, and
 * grants at least one read at a time (responder_resources).
 */
#ifndef _UAPI_LINUX_PSEUDO_MM_RDMA_H
#define _UAPI_LINUX_PSEUDO_MM_RDMA_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PSEUDO_MM_RDMA_MAGIC	0x706d6d72	/* the bytes "rmmp" */
#define PSEUDO_MM_RDMA_VERSION	1

/* Room in a request for what the caller says to the server. */
#define PSEUDO_MM_RDMA_MAX_HELLO 56

/**
 * struct pseudo_mm_rdma_pool - what a server says of its pool
 * @magic: PSEUDO_MM_RDMA_MAGIC
 * @version: PSEUDO_MM_RDMA_VERSION
 * @address: where the pool begins, as RDMA addresses it
 * @pages: pages of the pool
 * @generation: another one for each pool that the server has had
 * @uuid: of the pool
 * @rkey: by which the memory can be read
 * @page_size: 4096
 *
 * The private data of the server's reply, little-endian; what follows is ignored.
 */
struct pseudo_mm_rdma_pool {
	__le32 magic;
	__le32 version;
	__le64 address;
	__le64 pages;
	__le64 generation;
	__u8 uuid[16];
	__le32 rkey;
	__le32 page_size;
};

/**
 * struct pseudo_mm_rdma_connect - PSEUDO_MM_RDMA_CONNECT: connect to a server
 * @size: of this structure
 * @timeout_ms: how long a step of connecting, and a read, may take; 1 to 60000
 * @server: a pointer to a struct sockaddr_in or sockaddr_in6
 * @server_size: its size
 * @hello_size: bytes at @hello, at most PSEUDO_MM_RDMA_MAX_HELLO
 * @hello: a pointer to what the request carries, or 0
 * @pages: 0; then the pages of the pool
 * @generation: 0; then the server's
 * @uuid: 0; then the pool's
 *
 * When the connection is lost it is made again, by the same request, once a
 * page is needed, and at most each second. The pool must still be the one that
 * has this uuid, generation and size. Until then, and where reading fails, a
 * page that is not in memory is SIGBUS.
 *
 * EPERM: no CAP_SYS_ADMIN. EISCONN: the descriptor is connected. EINVAL: a
 * field that is none of the above. EAFNOSUPPORT: an address of another family.
 * ECONNREFUSED: nobody listens there, or the server does not want this reader.
 * EPROTO: its answer is none. EOPNOTSUPP: the network device cannot do it
 * (iWARP). ENODEV: no network device leads there, or it went away. EINTR: the
 * caller is being killed. ETIMEDOUT, EHOSTUNREACH and other errors of finding
 * the way: the server was not reached.
 */
struct pseudo_mm_rdma_connect {
	__u32 size;
	__u32 timeout_ms;
	__aligned_u64 server;
	__u32 server_size;
	__u32 hello_size;
	__aligned_u64 hello;
	__aligned_u64 pages;
	__aligned_u64 generation;
	__u8 uuid[16];
};

#define PSEUDO_MM_RDMA_CONNECT	_IO(0x1c, 0x40)

#endif
