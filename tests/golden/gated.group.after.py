class GraphModule(torch.nn.Module):
    def forward(self, L_self_modules_query_parameters_weight_: "f32[32, 32]", L_self_modules_query_parameters_bias_: "f32[32]", L_x_: "f32[3, 32]", L_self_modules_key_parameters_weight_: "f32[32, 32]", L_self_modules_key_parameters_bias_: "f32[32]", L_self_modules_value_parameters_weight_: "f32[32, 32]", L_self_modules_value_parameters_bias_: "f32[32]", L_self_modules_gate_parameters_weight_: "f32[64, 32]", L_self_modules_up_parameters_weight_: "f32[64, 32]", L_self_modules_up_parameters_bias_: "f32[64]", L_self_modules_down_parameters_weight_: "f32[32, 64]"):
        l_self_modules_query_parameters_weight_ = L_self_modules_query_parameters_weight_
        l_self_modules_query_parameters_bias_ = L_self_modules_query_parameters_bias_
        l_x_ = L_x_
        l_self_modules_key_parameters_weight_ = L_self_modules_key_parameters_weight_
        l_self_modules_key_parameters_bias_ = L_self_modules_key_parameters_bias_
        l_self_modules_value_parameters_weight_ = L_self_modules_value_parameters_weight_
        l_self_modules_value_parameters_bias_ = L_self_modules_value_parameters_bias_
        l_self_modules_gate_parameters_weight_ = L_self_modules_gate_parameters_weight_
        l_self_modules_up_parameters_weight_ = L_self_modules_up_parameters_weight_
        l_self_modules_up_parameters_bias_ = L_self_modules_up_parameters_bias_
        l_self_modules_down_parameters_weight_ = L_self_modules_down_parameters_weight_

        # File: tests/models/gated.py:19 in forward, code: x = x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        pifa_pivot_rows_0: "f32[8, 32]" = self.pifa_pivot_rows_0;  pifa_pivot_rows_0 = None
        pifa_coefficients_1: "f32[24, 8]" = self.pifa_coefficients_1
        pifa_row_order_2: "i32[32]" = self.pifa_row_order_2;  pifa_row_order_2 = None
        pifa_pivot_rows_28: "f32[24, 32]" = self.pifa_pivot_rows_28
        linear_6 = torch._C._nn.linear(l_x_, pifa_pivot_rows_28);  pifa_pivot_rows_28 = None
        getitem = linear_6[(Ellipsis, slice(0, 8, None))]
        linear_7 = torch._C._nn.linear(getitem, pifa_coefficients_1);  pifa_coefficients_1 = None
        cat = torch.cat([getitem, linear_7], -1);  getitem = linear_7 = None
        pifa_gather_order_29: "i64[32]" = self.pifa_gather_order_29
        _unsafe_index_tensor = torch.ops.aten._unsafe_index.Tensor(cat, [None, pifa_gather_order_29]);  cat = pifa_gather_order_29 = None
        add_2: "f32[3, 32]" = torch.add(_unsafe_index_tensor, l_self_modules_query_parameters_bias_);  _unsafe_index_tensor = l_self_modules_query_parameters_bias_ = None
        pifa_pivot_rows_3: "f32[8, 32]" = self.pifa_pivot_rows_3;  pifa_pivot_rows_3 = None
        pifa_coefficients_4: "f32[24, 8]" = self.pifa_coefficients_4
        pifa_row_order_5: "i32[32]" = self.pifa_row_order_5;  pifa_row_order_5 = None
        getitem_1 = linear_6[(Ellipsis, slice(8, 16, None))]
        linear_8 = torch._C._nn.linear(getitem_1, pifa_coefficients_4);  pifa_coefficients_4 = None
        cat_1 = torch.cat([getitem_1, linear_8], -1);  getitem_1 = linear_8 = None
        pifa_gather_order_30: "i64[32]" = self.pifa_gather_order_30
        _unsafe_index_tensor_1 = torch.ops.aten._unsafe_index.Tensor(cat_1, [None, pifa_gather_order_30]);  cat_1 = pifa_gather_order_30 = None
        add_3: "f32[3, 32]" = torch.add(_unsafe_index_tensor_1, l_self_modules_key_parameters_bias_);  _unsafe_index_tensor_1 = l_self_modules_key_parameters_bias_ = None
        pifa_pivot_rows_6: "f32[8, 32]" = self.pifa_pivot_rows_6;  pifa_pivot_rows_6 = None
        pifa_coefficients_7: "f32[24, 8]" = self.pifa_coefficients_7
        pifa_row_order_8: "i32[32]" = self.pifa_row_order_8;  pifa_row_order_8 = None
        getitem_2 = linear_6[(Ellipsis, slice(16, 24, None))];  linear_6 = None
        linear_9 = torch._C._nn.linear(getitem_2, pifa_coefficients_7);  pifa_coefficients_7 = None
        cat_2 = torch.cat([getitem_2, linear_9], -1);  getitem_2 = linear_9 = None
        pifa_gather_order_31: "i64[32]" = self.pifa_gather_order_31
        _unsafe_index_tensor_2 = torch.ops.aten._unsafe_index.Tensor(cat_2, [None, pifa_gather_order_31]);  cat_2 = pifa_gather_order_31 = None
        add_4: "f32[3, 32]" = torch.add(_unsafe_index_tensor_2, l_self_modules_value_parameters_bias_);  _unsafe_index_tensor_2 = l_self_modules_value_parameters_bias_ = None
        scaled_dot_product_attention: "f32[3, 32]" = torch._C._nn.scaled_dot_product_attention(add_2, add_3, add_4);  add_2 = add_3 = add_4 = None
        x: "f32[3, 32]" = l_x_ + scaled_dot_product_attention;  l_x_ = scaled_dot_product_attention = None

        # File: tests/models/gated.py:20 in forward, code: return x + self.down(F.silu(self.gate(x)) * self.up(x))
        pifa_pivot_rows_9: "f32[12, 32]" = self.pifa_pivot_rows_9;  pifa_pivot_rows_9 = None
        pifa_coefficients_10: "f32[52, 12]" = self.pifa_coefficients_10;  pifa_coefficients_10 = None
        pifa_row_order_11: "i32[64]" = self.pifa_row_order_11;  pifa_row_order_11 = None
        pifa_row_order_18: "i32[64]" = self.pifa_row_order_18;  pifa_row_order_18 = None
        pifa_pivot_rows_21: "f32[12, 32]" = self.pifa_pivot_rows_21;  pifa_pivot_rows_21 = None
        pifa_coefficients_22: "f32[52, 12]" = self.pifa_coefficients_22
        pifa_row_order_23: "i32[64]" = self.pifa_row_order_23;  pifa_row_order_23 = None
        pifa_pivot_rows_32: "f32[24, 32]" = self.pifa_pivot_rows_32
        linear_10 = torch._C._nn.linear(x, pifa_pivot_rows_32);  pifa_pivot_rows_32 = None
        getitem_3 = linear_10[(Ellipsis, slice(0, 12, None))]
        linear_11 = torch._C._nn.linear(getitem_3, pifa_coefficients_22);  pifa_coefficients_22 = None
        cat_3: "f32[3, 64]" = torch.cat([getitem_3, linear_11], -1);  getitem_3 = linear_11 = None
        silu: "f32[3, 64]" = torch.nn.functional.silu(cat_3);  cat_3 = None
        pifa_pivot_rows_12: "f32[12, 32]" = self.pifa_pivot_rows_12;  pifa_pivot_rows_12 = None
        pifa_coefficients_13: "f32[52, 12]" = self.pifa_coefficients_13;  pifa_coefficients_13 = None
        pifa_row_order_14: "i32[64]" = self.pifa_row_order_14;  pifa_row_order_14 = None
        pifa_bias_19: "f32[64]" = self.pifa_bias_19
        pifa_row_order_20: "i32[64]" = self.pifa_row_order_20;  pifa_row_order_20 = None
        pifa_pivot_rows_24: "f32[12, 32]" = self.pifa_pivot_rows_24;  pifa_pivot_rows_24 = None
        pifa_coefficients_25: "f32[52, 12]" = self.pifa_coefficients_25
        pifa_row_order_26: "i32[64]" = self.pifa_row_order_26;  pifa_row_order_26 = None
        getitem_4 = linear_10[(Ellipsis, slice(12, 24, None))];  linear_10 = None
        linear_12 = torch._C._nn.linear(getitem_4, pifa_coefficients_25);  pifa_coefficients_25 = None
        getitem_5 = linear_12[(Ellipsis, slice(0, 12, None))]
        getitem_6 = linear_12[(Ellipsis, slice(12, 52, None))];  linear_12 = None
        cat_4 = torch.cat([getitem_5, getitem_4, getitem_6], -1);  getitem_5 = getitem_4 = getitem_6 = None
        add_5: "f32[3, 64]" = torch.add(cat_4, pifa_bias_19);  cat_4 = pifa_bias_19 = None
        mul: "f32[3, 64]" = silu * add_5;  silu = add_5 = None
        pifa_pivot_rows_15: "f32[12, 64]" = self.pifa_pivot_rows_15;  pifa_pivot_rows_15 = None
        pifa_coefficients_16: "f32[20, 12]" = self.pifa_coefficients_16
        pifa_row_order_17: "i32[32]" = self.pifa_row_order_17
        pifa_pivot_rows_27: "f32[12, 64]" = self.pifa_pivot_rows_27
        linear_default_5: "f32[3, 32]" = torch.ops.pifa.linear.default(mul, pifa_pivot_rows_27, pifa_coefficients_16, pifa_row_order_17, None, 1.0);  mul = pifa_pivot_rows_27 = pifa_coefficients_16 = pifa_row_order_17 = None
        add_1: "f32[3, 32]" = x + linear_default_5;  x = linear_default_5 = None
        return (add_1,)

